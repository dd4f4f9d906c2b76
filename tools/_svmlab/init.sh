#!/bin/busybox sh
# The lab's first process. /lab is a small folder shared with the host:
# "rw" and "run.sh" (what to do) are read from it, "booted" and "rc" are written to it.

/bin/busybox --install -s /bin
export PATH=/bin

say() {
    echo "svmlab: $*" >/dev/ttyS0
}

die() {
    say "FATAL $*"
    sync
    poweroff -f
    sleep 60
}

mount_9p() { # TAG FOLDER OPTIONS
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" || die "cannot mount $2 from the host"
}

load_modules() {
    for module in $(cat /m/order); do
        options=
        [ -f "/m/$module.opts" ] && options=$(cat "/m/$module.opts")
        insmod "/m/$module.ko" $options || die "cannot load module $module $options"
    done
}

# The host's root below, a throw-away layer above.
mount_root() {
    mount_9p root /lower ro,cache=loose,access=any
    mount -t tmpfs -o size=75% upper /upper
    mkdir /upper/files /upper/work
    mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /new ||
        die "cannot mount the overlay"
}

mount_kernel_filesystems() {
    for name in dev proc sys run; do
        [ -d "/new/$name" ] || mkdir -p "/new/$name"
    done
    for name in dev proc sys; do
        mount --move "/$name" "/new/$name"
    done
    mkdir -p /new/dev/pts /new/dev/shm
    mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /new/dev/pts
    mount -t tmpfs shm /new/dev/shm
    mount -t tmpfs run /new/run
    mount -t debugfs debugfs /new/sys/kernel/debug 2>/dev/null
    mount -t tracefs tracefs /new/sys/kernel/tracing 2>/dev/null
    ln -s /proc/self/fd /new/dev/fd
    ln -s fd/0 /new/dev/stdin
    ln -s fd/1 /new/dev/stdout
    ln -s fd/2 /new/dev/stderr
}

# As udev would: /dev/kvm belongs to the group kvm of the host's /etc/group.
set_up_kvm() {
    [ -c /new/dev/kvm ] || die "no /dev/kvm: kvm_amd found no SVM in this --cpu"
    chmod 660 /new/dev/kvm
    group=$(sed -n 's/^kvm:[^:]*:\([0-9]*\):.*/\1/p' /new/etc/group | head -n 1)
    chown "0:${group:-0}" /new/dev/kvm
}

# Folders come octal-escaped, one a line, so that any name survives the shell.
mount_writable() {
    number=0
    for escaped in $(cat /lab/rw); do
        folder=$(printf '%b' "$escaped")
        mkdir -p "/new$folder"
        mount_9p "rw$number" "/new$folder" cache=mmap
        number=$((number + 1))
    done
}

find_output_port() {
    for port in /new/sys/class/virtio-ports/*; do
        [ "$(cat "$port/name")" = out ] && output=/new/dev/${port##*/}
    done
    [ -c "$output" ] || die "no output port"
}

is_running() { # PID; a zombie has ended
    [ -d "/new/proc/$1" ] && ! grep -q '^State:.Z' "/new/proc/$1/status"
}

run_command() {
    mkfifo /out
    cat </out >"$output" &
    copier=$!
    cp /lab/run.sh /new/run/svmlab.sh
    cut -d' ' -f1 /new/proc/uptime >/lab/booted
    chroot /new /bin/sh /run/svmlab.sh </dev/null >/out 2>&1
    code=$?
    # Wait for the last output, but not for a stray process that still holds it.
    tenths=0
    while is_running $copier && [ $tenths -lt 50 ]; do
        sleep 0.1
        tenths=$((tenths + 1))
    done
    echo $code >/lab/rc.new
    mv /lab/rc.new /lab/rc # the host must never read half a file
    sync
}

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
load_modules
mount_9p lab /lab cache=none
mount_root
mount_kernel_filesystems
ifconfig lo 127.0.0.1 up
hostname svmlab
set_up_kvm
mount_writable
find_output_port
run_command
poweroff -f
