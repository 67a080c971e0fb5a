"""SLURM: does every task that `srun` started take part in this one run?

Lightning reads rank and world size from SLURM's variables, but only for some job names, and lets several mismatches
pass: then each task trains on its own, and all of them export into one folder. Standard library only.
"""

from collections.abc import Mapping

__all__ = ["check_tasks"]

_INTERACTIVE = ("bash", "interactive")  # the job names for which Lightning ignores SLURM


def check_tasks(world_size: int, environ: Mapping[str, str]) -> None:
    """Compare the Trainer's world with the tasks that SLURM started; silent outside SLURM and under `torchrun`.

    Call it as soon as the Trainer exists: a missing rank makes the next step, the rendezvous, wait for half an hour.

    Args:
        world_size: ``trainer.world_size``.
        environ: the process's environment, ``os.environ``.

    Raises:
        ValueError: tasks that Lightning will not join, a job of several tasks without `srun`, or
            ``world_size != SLURM_NTASKS``.
    """
    if "SLURM_NTASKS" not in environ or "TORCHELASTIC_RUN_ID" in environ:
        return
    tasks = _number("SLURM_NTASKS", environ)
    in_step = "SLURM_STEP_ID" in environ  # srun sets it; the batch script itself has none
    if environ.get("SLURM_JOB_NAME") in _INTERACTIVE:
        if in_step and _number("SLURM_STEP_NUM_TASKS", environ) > 1:
            raise ValueError(
                f"srun started {tasks} tasks in a job named {environ['SLURM_JOB_NAME']!r}, for which Lightning ignores "
                "SLURM: each task would train and export alone; name the step, srun --job-name=train ..."
            )
        return
    if tasks > 1 and not in_step:
        raise ValueError(
            f"SLURM_NTASKS={tasks}, but this process was not started by srun: rank 0 would wait for the other "
            f"{tasks - 1} for ever; put srun before python, as scripts/slurm/train.sbatch does"
        )
    if world_size != tasks:
        raise ValueError(
            f"SLURM started {tasks} tasks (SLURM_NTASKS), but the Trainer has world_size={world_size}: expected one "
            "task per device, else every task trains and exports alone into one folder; use trainer=slurm, or "
            f"Trainer(devices={environ.get('SLURM_NTASKS_PER_NODE', '<tasks per node>')}, "
            f"num_nodes={environ.get('SLURM_NNODES', '<nodes>')})"
        )


def _number(name: str, environ: Mapping[str, str]) -> int:
    value = environ.get(name, "1")
    if not value.strip().isdecimal():
        raise ValueError(
            f"{name}={value!r} is not a number of tasks, which SLURM sets it to: start the run with srun, or take the "
            f"variable out of the environment (unset {name})"
        )
    return int(value)
