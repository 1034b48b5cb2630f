"""One machine: its own network, processes, mounts and name; commands come by SSH or from the test."""

import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil

HOME = "/mnt/home"
PYTHON = f"{HOME}/venv/bin/python"
_SSHD_CONFIG = """\
HostKey /mnt/etc/host_key
AuthorizedKeysFile /mnt/etc/authorized_keys
PermitRootLogin prohibit-password
StrictModes no
PidFile none
Subsystem sftp internal-sftp
"""
# The first process of the machine: like an init, it adopts and reaps orphaned processes.
_INIT = """\
set -e
mount --bind "$FOLDER/mnt" /mnt
for path in $KEPT; do mkdir -p "$FOLDER$path"; mount --bind "$path" "$FOLDER$path"; done
mount --rbind "$FOLDER/tmp" /tmp
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mkdir /run/sshd
mount --bind /mnt/etc/passwd /etc/passwd
hostname "$NAME"
/usr/sbin/sshd -D -e -f /mnt/etc/sshd_config 2> /mnt/etc/sshd.log &
touch /mnt/etc/up
while true; do wait -n || sleep 0.2; done
"""
_SCRIPT = """\
#!{python}
import sys
from {module} import {function}
sys.argv[0] = {name!r}
sys.exit({function}())
"""
_START_TIMEOUT_S = 20.0


class Machine:
    """A machine at `ip` in an existing network namespace; `folder` holds its home and /tmp."""

    def __init__(self, name: str, ip: str, namespace: str, folder: Path, public_key: str) -> None:
        self.name = name
        self.ip = ip
        self.folder = folder
        self.home = folder / "mnt" / "home"
        self._write_files(public_key)
        environment = {
            "PATH": os.environ["PATH"],
            "FOLDER": str(folder),
            "KEPT": shlex.join(_kept()),
            "NAME": name,
        }
        own = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--mount", "--uts"]
        self._process = subprocess.Popen(
            # When the test process ends for any reason, its machines end too.
            ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", namespace, *own, "bash", "-c", _INIT],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (folder / "mnt/etc/up").exists():
            assert self._process.poll() is None, "the machine ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def run(
        self, command: str, *, timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a line of shell in the home folder, as its user would."""
        process = self.start(command)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if check:
            assert process.returncode == 0, f"{self.name}: {command}\n{output}"
        return subprocess.CompletedProcess(command, process.returncode, output)

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a line of shell in the home folder."""
        shell = f"cd {HOME} && source .bashrc && {command}"
        (init,) = psutil.Process(self._process.pid).children()
        return subprocess.Popen(
            ["nsenter", "--target", str(init.pid), "--all", "bash", "-c", shell],
            env={"HOME": HOME, "PATH": os.defpath, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[str]:
        """Return the command lines of all processes here except init and sshd."""
        (init,) = psutil.Process(self._process.pid).children()
        lines = []
        for process in init.children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if line and not line.startswith(("sshd:", "/usr/sbin/sshd", "sleep ")):
                lines.append(line)
        return lines

    def install(self, **scripts: str) -> None:
        """Install a virtual environment that finds the packages of this Python, offline.

        `scripts` are its commands ("module:function").
        """
        venv = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        self.run(f"{venv} -m venv --without-pip {HOME}/venv")
        (found,) = self.home.glob("venv/lib/*/site-packages")
        # The .pth files in that folder, such as the one of an editable azu, have no effect here.
        (found / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for name, entry in {"pip": "pip._internal.cli.main:main", **scripts}.items():
            module, _, function = entry.partition(":")
            script = self.home / "venv/bin" / name
            script.write_text(_SCRIPT.format(python=PYTHON, module=module, function=function, name=name))
            script.chmod(0o755)

    def stop(self) -> None:
        """End the machine and everything on it."""
        self._process.kill()
        self._process.wait(_START_TIMEOUT_S)

    def _write_files(self, public_key: str) -> None:
        etc = self.folder / "mnt/etc"
        for folder in (etc, self.home / ".ssh", self.folder / "tmp"):
            folder.mkdir(parents=True)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / "host_key")], check=True
        )
        (etc / "sshd_config").write_text(_SSHD_CONFIG)
        (etc / "authorized_keys").write_text(public_key)
        others = [
            line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")
        ]
        (etc / "passwd").write_text("\n".join([f"root:x:0:0:root:{HOME}:/bin/bash", *others]) + "\n")
        (self.home / ".bashrc").write_text(f"export PATH={HOME}/venv/bin:$PATH\n")
        # A build cannot fetch its tools without a network: it uses those of this Python.
        (self.home / ".config/pip").mkdir(parents=True)
        (self.home / ".config/pip/pip.conf").write_text(
            "[install]\nno-build-isolation = false\n[global]\nno-index = true\n"
        )


def _kept() -> list[str]:
    """Return the parts of this machine's /tmp that a machine sees: this Python."""
    return [path for path in (sys.prefix,) if path.startswith("/tmp/")]
