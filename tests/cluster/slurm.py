"""SLURM on this machine alone: munged, slurmctld and slurmd, started for a test and ended with it.

Needs root, and Debian's packages slurm-wlm and munge. Nothing of the system's own SLURM or munge is touched: key,
socket, configuration, state and logs are in a folder of the test's.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
CONFIGURATION = """
ClusterName=alone
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why SLURM cannot be brought up here; empty where it can."""
    if os.geteuid() != 0:
        return "its daemons need root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed: apt-get install -y slurm-wlm munge" if absent else ""


class Slurm:
    """A cluster of one node, while open; commands find it by the variable SLURM_CONF."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Slurm:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        conf = self.folder / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        conf.write_text(
            CONFIGURATION.format(
                host=host,
                folder=self.folder,
                cpus=os.cpu_count(),
                memory=4096,
                controller=_free_port(),
                node=_free_port(),
            )
        )
        os.environ["SLURM_CONF"] = str(conf)
        munge = ("--foreground", f"--key-file={key}", f"--socket={self.folder}/munge.socket", "--force")
        logs = (f"--log-file={self.folder}/munged.log", f"--pid-file={self.folder}/munged.pid")
        seed = f"--seed-file={self.folder}/munged.seed"
        try:
            self._start("munged", *munge, *logs, seed)
            self._until(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D", "-f", str(conf))
            self._start("slurmd", "-D", "-f", str(conf), "-N", host)
            self._until(lambda: "idle" in self._asked("sinfo", "--noheader", "--format=%T"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop("SLURM_CONF", None)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def told(self) -> str:
        """What the daemons have logged, for a test that failed."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as output:
            self.daemons.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))

    def _asked(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout

    def _until(self, happened, seconds: float = 60) -> None:
        patience = time.monotonic() + seconds
        while not happened():
            dead = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not dead and time.monotonic() < patience, f"{dead or 'too slow'}\n{self.told()}"
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
