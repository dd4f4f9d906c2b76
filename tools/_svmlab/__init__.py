"""Run a command on a machine whose /dev/kvm is the mainstream kvm_amd.

QEMU's pure software emulator (TCG) emulates an AMD processor with SVM and
nested paging. A stock Debian kernel booted on it loads the ordinary kvm and
kvm_amd modules, so programs inside see an ordinary AMD /dev/kvm. Nothing here
needs, or uses, a /dev/kvm of the host. It is slow, but it is the real module.

  svmlab setup [--kernel 6.1|6.12] [--force]
        Install qemu-system-x86 if it is missing (apt-get, needs root), and
        fetch a Debian kernel package and a static busybox into the cache
        (unpacked there, never installed: no bootloader hook runs).

  svmlab run [options] -- COMMAND [ARG...]
        Boot the lab, run COMMAND there, print its output (stdout and stderr
        merged), and exit with its exit code. The lab's root is the host's own
        file system, read-only underneath and with a throw-away writable layer
        on top, so the host's Python, its virtual environments and the project
        folder are all at their usual paths. What the command writes is lost,
        but for folders named with --rw.

        --project DIR     folder to run in (default: the current one)
        --rw DIR          share DIR writable, at the same path (repeatable)
        --timeout S       seconds allowed for COMMAND (default 600); exit 124
        --boot-timeout S  seconds allowed for the boot (default 120); exit 125
        --smp N           processors of the lab (default 2)
        --mem MIB         memory of the lab (default 2048)
        --kernel SERIES   which kernel to boot (default 6.1); set it up first
        --cpu MODEL       QEMU CPU model (default "max,la57=off")
        --kvm "OPTS"      options of the kvm module     (e.g. "halt_poll_ns=0")
        --kvm-amd "OPTS"  options of the kvm_amd module (e.g. "npt=0")
        --env NAME=VALUE  set a variable inside (repeatable); PATH, HOME, LANG,
                          LC_*, TERM, VIRTUAL_ENV, PYENV_* and PYTHON* go along,
                          and SVMLAB=1 is always set
        --keep            keep the run's folder (console log) and say where
        -v, --verbose     say how long each step took

  svmlab info           what is cached, and its versions

The cache is $SVMLAB_CACHE, or $XDG_CACHE_HOME/svmlab, or ~/.cache/svmlab.

Exit codes of "run": COMMAND's own (128+N where signal N ended it); 124 when it
ran past --timeout; 125 when the lab itself failed (not set up, did not boot,
crashed); 2 for wrong usage.

Known limits of the emulated processor (QEMU 7.2 TCG, not of kvm_amd): hardware
and software guest breakpoints (KVM_GUESTDBG_USE_HW_BP, _USE_SW_BP) never report
KVM_EXIT_DEBUG (single-stepping does); no virtual PMU, no AVIC, SEV, nRIP-save or
TSC scaling; timings mean nothing.

Layout: host.py (cache and host commands), setup.py (fills the cache),
initramfs.py and init.sh (the lab's first process), lab.py (one run), cli.py.
"""
