"""What the libraries say when something cannot be loaded, for a sentence of ours."""


def cause(error: Exception) -> str:
    """The first sentence of an error, without its period; its kind, if it says nothing."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
