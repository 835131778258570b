# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The filter of system calls: by a reading of classic BPF for every architecture, and in the kernel for this one."""

import json
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_attnres.eval.tasks.offline import sandbox
from modeling_attnres.eval.tasks.offline.sandbox_child import EXECUTABLE, FILTERS, bpf_program


DANGEROUS = {  # on x86-64, on 64-bit Arm
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138)},
    **{"rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434)},
    **{"pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270)},
    **{"process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272)},
    **{"execve": (59, 221), "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "bpf": (321, 280), "userfaultfd": (323, 282)},
    **{"perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217), "unshare": (272, 97)},
    **{"setns": (308, 268), "mount": (165, 40), "open_by_handle_at": (304, 265), "openat2": (437, 437)},
    **{"prctl": (157, 167), "seccomp": (317, 277), "setrlimit": (160, 164), "memfd_create": (319, 279)},
    **{"pipe2": (293, 59), "dup3": (292, 24), "sendfile": (40, 71), "splice": (275, 76), "vmsplice": (278, 75)},
    **{"timer_create": (222, 107), "fanotify_init": (300, 262), "inotify_init1": (294, 26), "shmget": (29, 194)},
    **{"mq_open": (240, 180), "landlock_create_ruleset": (444, 444), "clone3": (435, 435), "capset": (126, 91)},
    "a call that no kernel has yet": (1000, 1000),
}
SYSTEM_CALLS = """
import ctypes, errno, json, sys
sys.path.insert(0, sys.argv[1])
from offline import sandbox_child as child

numbers = json.loads(sys.argv[2])
child.prctl(child.PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")
child.give_up_files()
child.give_up_system_calls(200)
call = ctypes.CDLL(None, use_errno=True).syscall
found = {}
for name, number in numbers.items():
    # Nothing would come of these arguments if the call went through.
    result = call(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
    found[name] = errno.errorcode.get(ctypes.get_errno()) if result == -1 else result
print(json.dumps(found))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in FILTERS,
    reason="generated code is only run where Linux can confine it",
)
def test_the_kernel_refuses_system_calls_even_to_machine_code():
    """The filter by itself: this process, unlike a program, has ctypes."""
    place = FILTERS[platform.machine()][0]
    numbers = {name: both[place] for name, both in DANGEROUS.items()}
    command = [sys.executable, "-c", SYSTEM_CALLS, str(Path(sandbox.__file__).parents[1]), json.dumps(numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == dict.fromkeys(numbers, "EPERM")


def verdict(code: bytes, number: int, arguments=(), architecture: int = 0) -> int:
    """What the kernel makes of a filter: classic BPF over `struct seccomp_data`."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    value, at = 0, 0
    while True:
        opcode, if_true, if_false, operand = struct.unpack_from("=HBBI", code, 8 * at)
        at += 1
        if opcode == 0x06:
            return operand
        if opcode == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[opcode]
            at += if_true if holds else if_false


ALLOWED, KILLED, PERMISSION, NO_TERMINAL = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050019


@pytest.mark.parametrize("machine", sorted(FILTERS))
class TestFilter:
    def numbers(self, machine, *both):
        return both[FILTERS[machine][0]]

    def verdict(self, machine, number, *arguments):
        return verdict(bpf_program(machine), number, arguments, FILTERS[machine][1])

    def test_every_number_but_those_allowed(self, machine):
        allowed = [number for number in range(1 << 10) if self.verdict(machine, number) == ALLOWED]
        assert len(allowed) == self.numbers(machine, 63, 55)
        assert not {self.numbers(machine, *both) for both in DANGEROUS.values()} & set(allowed)

    def test_another_architecture_kills(self, machine):
        code = bpf_program(machine)
        for architecture in (0x40000003, 0x40000028, 0):  # 32-bit x86 and Arm
            assert verdict(code, 1, architecture=architecture) == KILLED
        assert self.verdict(machine, (1 << 30) + 1) == KILLED

    def test_files_are_opened_for_reading_only(self, machine):
        openat = self.numbers(machine, 257, 56)
        assert self.verdict(machine, openat, 0, 0, os.O_CLOEXEC) == ALLOWED
        for flags in (0o200000, 0o100000, 0o400000, 0o40000):  # which of them is O_DIRECT depends on the machine
            direct = self.numbers(machine, 0o40000, 0o200000)
            assert self.verdict(machine, openat, 0, 0, flags) == (PERMISSION if flags == direct else ALLOWED)
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_PATH, os.O_ASYNC, 3, 1 << 31):
            assert self.verdict(machine, openat, 0, 0, flags) == PERMISSION
        if machine == "x86_64":
            assert self.verdict(machine, 2, 0, os.O_CLOEXEC) == ALLOWED
            assert self.verdict(machine, 2, 0, os.O_WRONLY) == PERMISSION

    def test_descriptors_have_no_owners(self, machine):
        fcntl = self.numbers(machine, 72, 25)
        assert [self.verdict(machine, fcntl, 1, command) for command in (0, 1, 2, 3, 1030)] == [ALLOWED] * 5
        # F_SETFL, locks, F_SETOWN, F_SETSIG, F_SETOWN_EX, leases, F_NOTIFY, seals
        refused = (4, 5, 6, 7, 8, 10, 15, 37, 1024, 1026, 1033)
        assert [self.verdict(machine, fcntl, 1, command) for command in refused] == [PERMISSION] * len(refused)

    def test_terminals_are_none(self, machine):
        ioctl = self.numbers(machine, 16, 29)
        assert [self.verdict(machine, ioctl, 1, request) for request in (0x5450, 0x5451)] == [ALLOWED] * 2
        for request in (0x5412, 0x5401, 0x541C, 0x540E, 0x5422, 0x5452, 0x8901):  # TIOCSTI, TCGETS, TIOCLINUX...
            assert self.verdict(machine, ioctl, 1, request) == NO_TERMINAL

    def test_limits_are_read(self, machine):
        prlimit = self.numbers(machine, 302, 261)
        assert self.verdict(machine, prlimit, 0, 9, 0) == ALLOWED
        for arguments in ((0, 9, 1), (0, 9, 1 << 40), (1, 9, 0)):
            assert self.verdict(machine, prlimit, *arguments) == PERMISSION

    def test_one_file_is_executed(self, machine):
        execveat = self.numbers(machine, 322, 281)
        assert self.verdict(machine, execveat, EXECUTABLE, 0, 0, 0, 0x1000) == ALLOWED
        for arguments in ((3, 0, 0, 0, 0x1000), (EXECUTABLE, 0, 0, 0, 0), (0xFFFFFF9C, 0, 0, 0, 0)):
            assert self.verdict(machine, execveat, *arguments) == PERMISSION
