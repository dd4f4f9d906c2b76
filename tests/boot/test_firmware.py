import pytest

from kvmaio.boot import Firmware
from kvmaio.cpu import Context
from kvmaio.errors import ConfigurationError
from tests.boot.walker import ram

KIB = 1 << 10
MIB = 1 << 20
FOUR_GIB = 1 << 32


def contents(size: int) -> bytes:
    return b"".join(page.to_bytes(2, "little") * 2048 for page in range(size // (4 * KIB)))


@pytest.mark.parametrize("size", [4 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 16 * MIB])
def test_firmware_ends_at_4_gib_and_its_end_is_below_1_mib(size):
    memory = ram(MIB)
    data = contents(size)
    Firmware(data).place(memory)
    assert memory.read(FOUR_GIB - size, size) == data
    region = memory.region_at(FOUR_GIB - size)
    assert region is not None and region.readonly and region.size == size

    shadow = min(size, 128 * KIB)
    assert memory.read(0, MIB) == bytes(MIB - shadow) + data[-shadow:]
    below = memory.region_at(MIB - 1)
    assert below is not None and not below.readonly


def test_the_cpu_starts_as_after_reset_on_a_pc():
    state = Firmware(bytes(128 * KIB)).place(ram(MIB))
    assert state.context == Context()
    assert state.context.cs.base + state.context.rip == FOUR_GIB - 16
    assert (state.cpuid, state.xcr0, state.platform) == ("emulator-safe", False, "pc")


def test_firmware_from_a_file(tmp_path):
    file = tmp_path / "bios.bin"
    file.write_bytes(contents(64 * KIB))
    for source in (file, str(file)):
        assert Firmware(source).data == contents(64 * KIB)


def test_loading_again_replaces_what_the_guest_changed():
    memory = ram(MIB)
    firmware = Firmware(contents(128 * KIB))
    firmware.place(memory)
    memory.write(MIB - 16, bytes(16))
    firmware.place(memory)
    assert memory.read(MIB - 128 * KIB, 128 * KIB) == contents(128 * KIB)
    Firmware(bytes(128 * KIB)).place(memory)
    assert memory.read(FOUR_GIB - 128 * KIB, 128 * KIB) == bytes(128 * KIB)
    with pytest.raises(ConfigurationError, match=r"ROM 0xfffe0000.+ is already there"):
        Firmware(bytes(256 * KIB)).place(memory)


def test_firmware_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="1000 bytes: its size must be a multiple of 4096"):
        Firmware(bytes(1000))
    with pytest.raises(ConfigurationError, match="firmware is empty"):
        Firmware(b"")
    with pytest.raises(ConfigurationError, match="firmware is larger than the 16 MiB"):
        Firmware(bytes(16 * MIB + 4096))
    with pytest.raises(ConfigurationError, match=r"cannot read firmware .*/none: No such file"):
        Firmware(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="Is a directory"):
        Firmware(tmp_path)
    with pytest.raises(ConfigurationError, match="firmware /dev/zero is larger"):
        Firmware("/dev/zero")
    with pytest.raises(ConfigurationError, match="null"):
        Firmware("a\0b")
    with pytest.raises(ConfigurationError, match="firmware must be a path or bytes, not 4096"):
        Firmware(4096)  # type: ignore[arg-type]


def test_too_little_memory_is_refused():
    memory = ram(512 * KIB)
    with pytest.raises(ConfigurationError) as error:
        Firmware(bytes(128 * KIB)).place(memory)
    assert str(error.value) == (
        "the firmware's copy below 1 MiB does not fit at 0xe0000..0xfffff: the machine has "
        "RAM 0x0..0x7ffff; give the machine at least 1M of memory, or place it lower"
    )
    assert len(memory.regions) == 1
