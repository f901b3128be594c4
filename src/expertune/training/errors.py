"""The one error for what a user gave and can put right."""


class UserError(ValueError):
    """What the user gave cannot be done. One paragraph: what was expected, what came, what to do next.

    The command line prints it without a traceback; anything else that is raised is a bug and keeps its traceback.
    """


def one_paragraph(error: Exception) -> str:
    """What an error of somebody else's says, on one line."""
    return " ".join(str(error).split())
