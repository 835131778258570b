# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The confined child of `sandbox.py`: `python -I sandbox_child.py MEMORY SECONDS`, token and program on standard input.

System-call numbers: the kernel's `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h`.
"""

import ctypes
import errno
import os
import platform
import struct
import sys


UNAVAILABLE = 77  # exit code: the limits could not be set, nothing was run

# Numbers that every architecture shares: pidfd_send_signal, io_uring_setup, the mount calls, pidfd_open, clone3,
# openat2, mount_setattr, fchmodat2.
COMMON = (424, 425, 428, 429, 430, 431, 432, 433, 434, 435, 437, 442, 452)
FILTERS = {
    # machine: (audit architecture, denied calls, calls that open files with the position of their flags)
    "x86_64": (
        0xC000003E,
        (
            *(41, 42, 44, 46, 49, 53),  # socket, connect, sendto, sendmsg, bind, socketpair
            *(56, 57, 58, 59, 322),  # clone, fork, vfork, execve, execveat
            *(62, 200, 234, 129, 297, 101, 310, 311),  # signals to others, ptrace, process_vm_*
            *(76, 77, 82, 83, 84, 85, 86, 87, 88, 258, 259, 133, 263, 264, 265, 266, 316),  # change names and sizes
            *(90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235, 260, 261, 268, 280),  # change attributes
            *(155, 161, 165, 166, 272, 308, 160, 302),  # roots, mounts, namespaces, limits
            *(29, 240, 248, 249, 250, 298, 319, 321, 323, 175, 176, 313, 246, 169),  # shared memory, keys, kernel
        ),
        {2: 1, 257: 2},  # open, openat
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(198, 203, 206, 211, 200, 199),
            *(220, 221, 281),
            *(129, 130, 131, 138, 240, 117, 270, 271),
            *(45, 46, 33, 34, 35, 36, 37, 38, 276),
            *(52, 53, 54, 55, 5, 6, 7, 14, 15, 16, 88),
            *(41, 51, 40, 39, 97, 268, 164, 261),
            *(194, 180, 217, 218, 219, 241, 279, 280, 282, 105, 106, 273, 104, 142),
        ),
        {56: 2},  # openat
    ),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Classic BPF: load a word, jump if equal / at least / any bit set, return.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def bpf_program(machine: str) -> bytes:
    """The filter: another architecture's calls kill, denied calls and opening for writing fail with EPERM."""
    architecture, denied, opening = FILTERS[machine]
    code = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    # From 2**30 on, x86-64 numbers mean the same calls once more, for 32-bit pointers.
    code += [(AT_LEAST, 0, 1, 1 << 30), (RETURN, 0, 0, KILL)]
    for number in (*denied, *COMMON):
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    for number, position in opening.items():
        code += [(EQUAL, 0, 4, number), (LOAD, 0, 0, ARGUMENTS + 8 * position)]
        code += [(ANY_BIT, 0, 1, WRITING), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def give_up_system_calls():
    """
    Raises:
        OSError: if the kernel refuses the filter.
    """
    code = bpf_program(platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and their address at the next aligned place.
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    header = ctypes.create_string_buffer(program, len(program))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    if prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), header, zero, zero) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def main():
    import resource

    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    token, program = sys.stdin.read().split("\n", maxsplit=1)
    code = compile(program, "<generated>", "exec")
    result = os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        for limit, value in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_FSIZE, 1 << 20),  # what a traceback may take
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (value, value))
        give_up_system_calls()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        os._exit(UNAVAILABLE)
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit:
        raise RuntimeError("the program left before its end") from None
    os.write(result, token.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
