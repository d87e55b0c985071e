"""`python -m braces_cli`: the same as the console script `braces`."""

from braces_cli.cli.main import main

if __name__ == "__main__":
    main()
