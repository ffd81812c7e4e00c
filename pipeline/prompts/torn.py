"""Tell that a file breaks off."""


class Torn(Exception):
    """Data that breaks off or is damaged: the rows before it are whole, and none after it can be read.

    Args:
        kind: of the file, as "gzip".
        why: as its reader says.
    """

    def __init__(self, kind: str, why: object) -> None:
        super().__init__(kind, why)
        self.kind = kind
        self.why = " ".join(str(why).split())[:200]
