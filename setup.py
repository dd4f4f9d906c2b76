from setuptools import Extension, setup

MODULES = ["kvmaio/kvm/build_native.py:ffibuilder", "kvmaio/soft/build_soft.py:ffibuilder"]
ANSWERING = Extension(
    "kvmaio._answering",
    ["kvmaio/_answering.c"],
    extra_compile_args=["-O2", "-Wall", "-Wextra"],
    py_limited_api=True,
)
options = {"bdist_wheel": {"py_limited_api": "cp311"}, "build_ext": {"force": True}}
setup(cffi_modules=MODULES, ext_modules=[ANSWERING], options=options)
