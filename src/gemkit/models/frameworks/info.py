"""The part of the engine's `Runner` that is the same for every framework: a description, and no background work."""

from gemkit.engine.interface import RunnerInfo


class FrameworkInfo:
    """`Runner.info` and the methods around it, from attributes of the runner.

    path: framework and device. activations: their dtype. threads: of the CPU.
    """

    path: str
    activations: str
    threads: int
    weight_bytes: int
    token_bytes: int

    @property
    def info(self) -> RunnerInfo:
        return RunnerInfo(
            path=self.path,
            activations=self.activations,
            threads=self.threads,
            survives_fork=False,
            weight_bytes=self.weight_bytes,
            private_weight_bytes=self.weight_bytes,
            token_bytes=self.token_bytes,
        )

    def activation_bytes(self, positions: int) -> None:
        """Return None: the framework manages its own memory."""

    def settle(self) -> None:
        """There is no background work."""

    def close(self) -> None:
        """Memory is freed with the runner."""
