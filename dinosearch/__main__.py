"""`python -m dinosearch` is the `dinosearch` command."""

from dinosearch.cli import main

if __name__ == "__main__":
    main()
