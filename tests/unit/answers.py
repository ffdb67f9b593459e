"""What a process of its own is asked in tests; it imports little."""

from ssl_vit.common.errors import UserError


class Answers:
    """What a process may be asked."""

    def __init__(self, start):
        if start < 0:
            raise UserError("below nothing")
        self.start = start

    def add(self, more):
        return self.start + more

    def fail(self):
        raise OSError("no disk")
