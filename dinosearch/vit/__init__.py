"""A vision transformer and its folder. Knows timm and files; nothing of images, training or indexes."""
