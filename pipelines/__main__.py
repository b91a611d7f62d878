"""`python -m pipelines …` is `curlora …`."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
