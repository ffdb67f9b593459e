"""Names of members of shards, parted into key and extension."""


def split_name(name: str, full: bool = False) -> tuple[str, str]:
    """Key and extension of a member: parted at the first dot after the last slash, as WebDataset
    does; ``full``: at the last one."""
    start = name.rfind("/") + 1
    dot = name.rfind(".", start) if full else name.find(".", start)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])
