"""`python -m edgecompress`: the same as the console script."""

from edgecompress.cli import main

if __name__ == "__main__":
    main()
