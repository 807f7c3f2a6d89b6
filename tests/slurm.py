"""Starts Slurm with one node, without systemd or cgroups, and ends it after a test."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4 State=UP
"""


def is_installed():
    return os.geteuid() == 0 and all(shutil.which(name) for name in DAEMONS)


class Slurm:
    """A running Slurm.

    Attributes:
        environment: the environment variables with which commands use it.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(mode=0o711 if name == "munge" else 0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        port = 16000 + os.getpid() % 10000
        host = socket.gethostname().partition(".")[0]
        conf = self.folder / "slurm.conf"
        conf.write_text(CONF.format(host=host, folder=self.folder, port=port, node_port=port + 1))
        self.environment = os.environ | {"SLURM_CONF": str(conf)}
        munge = f"{self.folder}/munge"
        files = {"key-file": f"{munge}/key", "socket": f"{munge}/socket", "pid-file": f"{self.folder}/munged.pid"}
        files |= {"log-file": f"{munge}/log", "seed-file": f"{munge}/seed"}
        self._start("munged", "--force", *(f"--{option}={path}" for option, path in files.items()))
        self._start("slurmctld", "-f", conf)
        self._start("slurmd", "-f", conf)
        deadline = time.monotonic() + 30
        while self.run("sinfo", "-h", "-o", "%T").strip() not in ("idle", "mixed"):
            assert time.monotonic() < deadline, (self.folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)

    def _start(self, *command):
        subprocess.run(command, env=self.environment, check=True, timeout=30)

    def run(self, *command, **settings):
        """Runs a command of Slurm; returns its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=90, **settings)
        return done.stdout if command[0] != "srun" else done.stdout + done.stderr

    def close(self):
        """Cancels every job and ends Slurm."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=30, check=False)
        for name in reversed(DAEMONS):
            pid = self.folder / f"{name}.pid"
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGKILL if name == "slurmd" else signal.SIGTERM)
        shutil.rmtree(self.folder, ignore_errors=True)
