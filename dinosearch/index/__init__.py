"""Folders of images as searchable indexes: the catalog (SQLite), its synchronisation and its FAISS file."""
