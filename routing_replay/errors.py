"""Everything that a user of routing_replay can cause, as one small family of errors."""


class RoutingReplayError(Exception):
    """Base of all errors that a user can cause; our own bugs are assertions.

    The message is always built the same way: what is wrong, what was expected, what came instead,
    where, and what to do.

    Args:
        what: One clause that names the problem.
        expected: What would have been right.
        got: What was found.
        where: Layer, microbatch, rank, file and line, URL: whatever finds the place.
        fix: The next step for the user.
    """

    def __init__(self, what: str, *, expected=None, got=None, where=None, fix=None):
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        message = "; ".join(parts)
        if where is not None:
            message += f" [{where}]"
        if fix is not None:
            message += f". {fix}"
        super().__init__(message)
        self.what, self.expected, self.got, self.where, self.fix = what, expected, got, where, fix

    def __reduce__(self):
        # Errors cross process borders; default pickling would pass the message as `what`.
        fields = {"expected": self.expected, "got": self.got, "where": self.where, "fix": self.fix}
        return _rebuild, (type(self), self.what, fields)


def _rebuild(kind, what, fields):
    return kind(what, **fields)


class ConfigError(RoutingReplayError):
    """A flag, YAML key or combination of settings that cannot work."""


class RoutesError(RoutingReplayError):
    """Routes whose content cannot be true: shapes, expert ids, duplicates, counts."""


class PayloadError(RoutingReplayError):
    """Bytes from a server that are not the routes that were asked for."""


class TableError(RoutingReplayError):
    """A routes file that is damaged, foreign, or of another model."""


class PreflightError(RoutingReplayError):
    """A model or job configuration under which replay would be wrong."""


class ReplayError(RoutingReplayError):
    """A replay that did not keep its promise: wrong rows, an open scope, an incomplete receipt."""


class ObjectiveError(RoutingReplayError):
    """Inputs that an objective cannot score."""


class ServerError(RoutingReplayError):
    """A rollout server that died, refused, hung, or returned no routes."""


class DataError(RoutingReplayError):
    """A prompt file or a reference answer that cannot be used."""


class CheckpointError(RoutingReplayError):
    """A checkpoint that is incomplete, of another architecture, or cannot be written."""
