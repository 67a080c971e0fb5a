"""The passes over one group of modules: which modifiers see it together, which hooks act, and the order of events.

The modifiers of a recipe form stages: one with ``needs.own_pass`` is a stage of its own, neighbours without it share
one. In each stage all batches run through the group as the stages before have left it; the last stage may run in
lockstep.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from lightning_compress.calibration.activations import taken_off
from lightning_compress.calibration.capture import run_to_stop, stop
from lightning_compress.calibration.finite_checks import FiniteChecks
from lightning_compress.calibration.group_log import GroupLog
from lightning_compress.calibration.lockstep import LockstepThreads, run_in_lockstep
from lightning_compress.calibration.probe import Probe, nonfinite_error
from lightning_compress.core import Event, EventType, Lifecycle, Modifier, State
from lightning_compress.core.precision import model_precision
from lightning_compress.layers.memory import GrowthRelease

__all__ = ["ModuleGroup", "BlockPasses", "one_pass_obstacle"]


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that are finished together.

    Outside of all blocks ``name`` is empty and ``block`` is None; ``title`` names the group in messages and progress.
    """

    name: str
    block: nn.Module | None
    modules: Mapping[str, nn.Module]
    title: str


@dataclass
class BlockPasses:
    """Runs the stages of a recipe over groups of modules.

    Args:
        state: State of every event, but for the group.
        masks: Per batch the tokens that count, [B, T]; None: all.
        one_pass: The last stage runs in lockstep.
        report: Called with a text as work advances.
        log: Groups that it holds are not calibrated again.
        numbers: The number of each batch among those of all ranks.

    Attributes:
        threads: Threads of the batches in lockstep; the walk ends them.
        checks: Checks of activations, read before an event and after the last batch of a group.
    """

    lifecycle: Lifecycle
    state: State
    clock: Event
    masks: Sequence[Tensor | None]
    probe: Probe
    one_pass: bool
    report: Callable[[str], None]
    log: GroupLog
    numbers: Sequence[int] = ()
    batch: int = field(default=0, init=False)
    release: GrowthRelease = field(default_factory=GrowthRelease, init=False)
    threads: LockstepThreads = field(default_factory=LockstepThreads, init=False)
    checks: FiniteChecks = field(default_factory=FiniteChecks, init=False)

    def complete(
        self,
        group: ModuleGroup,
        run: Callable[[int], object],
        propagate: Callable[[int], object] | None,
        dense: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Show a group to every stage and let it finish the group's modules.

        Args:
            group: The modules.
            run: Runs a batch through them; the output is dropped.
            propagate: Runs a batch through them for the last time and stores the output; None: it is not needed.
            dense: Their output for a batch in the dense model; None: not known.
        """
        stages = [] if self._restored(group) else stages_of(self.lifecycle.modifiers)
        for stage in stages:
            hooked = self._hooked(stage, group)
            replay: Callable[[int], object] | None = partial(self._replay, group, run)
            if stage is stages[-1] and self.one_pass and hooked:
                self._lockstep(stage, group, hooked, propagate or run, to_end=propagate is not None)
                propagate = replay = None  # the inputs are now those of the next block
            elif hooked:
                self._look(stage, group, hooked, run)
            with self.lifecycle.paused():  # a replay is not new data for any modifier
                self.emit(EventType.BLOCK_END, group, stage, replay=replay, dense=dense)
            for modifier in stage:
                if modifier.needs.calibration:  # finished modules may run again on the way to later groups
                    modifier.remove_hooks(*group.modules.values())
        if stages:
            self.log.store(group.title, group.modules)
        if propagate is not None:
            with self.lifecycle.paused():
                for i in range(len(self.masks)):
                    self.begin(i, f"{group.title}: outputs, batch {i + 1}/{len(self.masks)}")
                    propagate(i)
        self.checks.read()

    def end(self, group: ModuleGroup) -> None:
        """BLOCK_END of a group that no batch runs through."""
        if not self._restored(group):
            self.emit(EventType.BLOCK_END, group)
            self.log.store(group.title, group.modules)

    def _restored(self, group: ModuleGroup) -> bool:
        """Whether the log holds the group, which is finished then."""
        if not self.log.restore(group.title, group.modules):
            return False
        for modifier in self.lifecycle.modifiers:
            if modifier.needs.calibration:
                modifier.remove_hooks(*group.modules.values())
        return True

    def emit(
        self,
        type_: EventType,
        group: ModuleGroup,
        only: Sequence[Modifier] | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        replay: Callable[[int], object] | None = None,
        dense: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Emit an event about a group, or about some of its modules."""
        self.checks.read()
        state = self.state.but(
            block=group.block,
            block_name=group.name,
            modules=group.modules if modules is None else modules,
            replay=replay,
            dense=dense,
            batches=0 if replay is None else len(self.masks),
        )
        if self.masks:
            self.release()  # what the batches have freed, before a solver needs memory
        self.lifecycle.emit(state, replace(self.clock, type_=type_), only=only)

    def begin(self, batch: int, text: str) -> None:
        """A batch begins to run, or goes on."""
        self.release()  # what a solver has freed, or a batch before
        self.batch = batch
        self.lifecycle.set_token_mask(self.masks[batch], self.numbers[batch])
        self.report(text)

    def _replay(self, group: ModuleGroup, run: Callable[[int], object], batch: int) -> object:
        self.begin(batch, f"{group.title}: once more, batch {batch + 1}/{len(self.masks)}")
        with model_precision():
            return run(batch)

    def _look(
        self,
        stage: Sequence[Modifier],
        group: ModuleGroup,
        hooked: Mapping[nn.Module, str],
        run: Callable[[int], object],
    ) -> None:
        with self._only(stage), self._finite_inputs(hooked), self._stopped_when_seen(group, hooked):
            for i in range(len(self.masks)):
                self.begin(i, f"{group.title}: statistics, batch {i + 1}/{len(self.masks)}")
                run_to_stop(partial(run, i))

    def _lockstep(
        self,
        stage: Sequence[Modifier],
        group: ModuleGroup,
        hooked: Mapping[nn.Module, str],
        run: Callable[[int], object],
        to_end: bool,
    ) -> None:
        at, team = ["start"], self.state.team

        def ready(module: nn.Module) -> None:
            at[0] = hooked[module]
            self.report(f"{group.title}: {at[0]}")
            self.emit(EventType.MODULE_READY, group, stage, {hooked[module]: module})
            self.log.interrupt()

        # a modifier of weights alone (rounding) waits for no data, and the batches must run through its result
        weighty = {n: m for n, m in group.modules.items() if any(True for _ in m.parameters(recurse=False))}
        unhooked = {n: m for n, m in weighty.items() if m not in hooked}
        if unhooked:
            self.emit(EventType.MODULE_READY, group, stage, unhooked)
        with self._only(stage), self._finite_inputs(hooked):
            run_in_lockstep(
                [partial(run, i) for i in range(len(self.masks))],
                hooked,
                ready,
                lambda i: self.begin(i, f"{group.title}: {at[0]}, batch {i + 1}/{len(self.masks)}"),
                to_end,
                None if team.alone else lambda number: _least(team.gather(number, group.title)),
                self.numbers,
                self.threads,
            )

    def _stopped_when_seen(self, group: ModuleGroup, hooked: Mapping[nn.Module, str]) -> AbstractContextManager[None]:
        """End each run at the last input: a Llama block's down_proj, a quarter of its work, is not computed."""
        seen: dict[int, set[nn.Module]] = {}

        def arrive(module: nn.Module, _args: object) -> None:
            modules = seen.setdefault(self.batch, set())
            modules.add(module)
            if len(modules) == len(hooked):
                stop()

        once = all(self.probe.counts[module] == 1 for module in hooked)
        possible = once and not any(module._forward_hooks for module in group.modules.values())
        return taken_off(module.register_forward_pre_hook(arrive) for module in (hooked if possible else ()))

    def _hooked(self, stage: Sequence[Modifier], group: ModuleGroup) -> dict[nn.Module, str]:
        """Modules of the group that the stage has hooked to calibrate, in the order of their calls."""
        names = {module: name for name, module in group.modules.items()}
        calibrating = [modifier for modifier in stage if modifier.needs.calibration]
        hooked = dict.fromkeys(m for modifier in calibrating for m in modifier.hooked if m in names)
        order = self.probe.order
        return {m: names[m] for m in sorted(hooked, key=lambda m: order.get(m, len(order)))}

    @contextmanager
    def _only(self, stage: Sequence[Modifier]) -> Iterator[None]:
        """Inside, the hooks of other modifiers are paused, and so are those of modifiers that do not calibrate."""
        with ExitStack() as stack:
            for modifier in self.lifecycle.modifiers:
                if not modifier.needs.calibration or not any(modifier is member for member in stage):
                    stack.enter_context(modifier.paused())
            yield

    def _finite_inputs(self, hooked: Mapping[nn.Module, str]) -> AbstractContextManager[None]:
        """ValueError with the module and the batch before NaN or Inf reaches a statistic."""

        def check(name: str, args: tuple[object, ...]) -> None:
            where, number = f"the input of module {name!r}", self.numbers[self.batch]
            self.checks.add(args[:1], self.masks[self.batch], lambda kind: nonfinite_error(kind, where, number, None))

        return taken_off(
            module.register_forward_pre_hook(lambda _m, args, n=name: check(n, args), prepend=True)
            for module, name in hooked.items()
        )


def _least(numbers: Sequence[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def stages_of(modifiers: Sequence[Modifier]) -> list[list[Modifier]]:
    """Modifiers in recipe order; one with ``needs.own_pass`` is a stage of its own, those after the walk join one."""
    stages: list[list[Modifier]] = []
    for modifier in modifiers:
        apart = bool(stages) and stages[-1][0].needs.own_pass and not modifier.needs.after_walk
        if modifier.needs.own_pass or not stages or apart:
            stages.append([modifier])
        else:
            stages[-1].append(modifier)
    return stages


def one_pass_obstacle(
    modifiers: Sequence[Modifier], counts: Mapping[nn.Module, int], targets: Mapping[nn.Module, str], uncalled: bool
) -> str | None:
    """Why the last stage cannot run in lockstep; None when it can.

    The hooks of the modifiers are on, ``counts`` are calls in one forward pass, and ``uncalled`` allows targets that
    the first batch does not reach (an expert without tokens?).
    """
    last = [m for m in stages_of(modifiers)[-1] if m.needs.calibration and not m.needs.after_walk]
    for modifier in last:
        single = modifier.needs.one_pass and not modifier.needs.replay
        if not single or type(modifier).on_module_ready is Modifier.on_module_ready:
            return f"{modifier.name} finishes whole blocks, not single modules"
    for modifier in stages_of(modifiers)[-1] if not uncalled else ():
        if modifier.handles_training_end and not modifier.needs.one_pass:  # as earlier versions did
            return f"{modifier.name} acts at the end of training; walk='one_pass' is possible, too"
    hooked = {m for modifier in last for m in modifier.hooked}
    for module, name in targets.items():
        if module in hooked and (counts.get(module, 0) > 1 or (not uncalled and module not in counts)):
            return f"{name!r} runs {counts.get(module, 0)} times in the forward pass of the first batch, expected once"
    return None
