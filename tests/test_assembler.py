import pytest

import kvmaio.assembler
from kvmaio.assembler import assemble
from kvmaio.boot.elf import read_elf
from kvmaio.errors import ConfigurationError
from tests.assembler import assemble as cached_assemble
from tests.assembler import cached_guests, guest_file, have_tools, link

needs_tools = pytest.mark.skipif(not have_tools(), reason="needs GNU as and ld (binutils)")
GUEST_FILES = ("hello32", "hello64", "multiboot32")


@needs_tools
def test_each_mode_has_its_word_size():
    assert assemble("mov ax, 1") == bytes.fromhex("b80100")
    assert assemble("mov eax, 1", mode="prot32") == bytes.fromhex("b801000000")
    assert assemble("mov rax, [rdi]", mode="long64") == bytes.fromhex("488b07")
    assert assemble("mov rax, [rdi]", mode="user64") == bytes.fromhex("488b07")


@needs_tools
def test_labels_are_absolute_and_sections_follow_each_other():
    code = assemble(
        "start: mov si, offset text",
        "jmp start",
        ".data",
        'text: .ascii "hi"',
        ".bss",
        "room: .skip 3",
        address=0x7C00,
    )
    assert code == bytes.fromhex("be057c ebfb") + b"hi\0\0\0"


@needs_tools
def test_a_mistake_is_reported_with_its_line():
    with pytest.raises(ConfigurationError) as error:
        assemble("nop", "bogus ax\nnop", "mov eax, [", mode="prot32")
    message = str(error.value)
    assert message.startswith(
        "as: line 2 (bogus ax): no such instruction: `bogus ax'; line 4 (mov "
    )


@needs_tools
def test_an_unknown_symbol_is_reported():
    with pytest.raises(ConfigurationError, match="undefined reference to `nowhere'"):
        assemble("jmp nowhere")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigurationError, match="mode 'real32': it must be one of real16, prot32"):
        assemble("nop", mode="real32")


def test_a_missing_assembler_is_reported(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        ConfigurationError, match="GNU as is not installed: install the package bin"
    ):
        assemble("nop")


def test_an_assembler_that_hangs_is_stopped(monkeypatch, tmp_path):
    fake = tmp_path / "as"
    fake.write_text("#!/bin/sh\nexec sleep 30\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(kvmaio.assembler, "_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(ConfigurationError, match="as took more than"):
        assemble("nop")


def test_the_cache_needs_no_assembler(monkeypatch):
    code = cached_assemble(["mov al, 'A'", "hlt"])
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cached_assemble(["mov al, 'A'", "hlt"]) == code == bytes.fromhex("b041f4")
    with pytest.raises(pytest.skip.Exception, match="not in tests/guests yet"):
        cached_assemble(["mov al, 'Q'", "hlt"], address=0x1234)


@needs_tools
def test_the_cached_guests_are_what_their_sources_say():
    for guest in cached_guests().values():
        code = assemble(guest["source"], mode=guest["mode"], address=guest["address"])
        assert code.hex() == guest["code"], guest["source"]


@needs_tools
@pytest.mark.parametrize("name", GUEST_FILES)
def test_the_linked_guests_are_what_their_sources_say(name):
    assert read_elf(link(name)) == read_elf(guest_file(name))
