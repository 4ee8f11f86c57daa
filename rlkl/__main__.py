"""`python -m rlkl`: the `rlkl` command, of this very Python."""

from rlkl.cli.main import main

if __name__ == "__main__":
    main()
