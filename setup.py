from setuptools import setup

MODULES = ["kvmaio/kvm/build_native.py:ffibuilder", "kvmaio/soft/build_soft.py:ffibuilder"]
options = {"bdist_wheel": {"py_limited_api": "cp311"}, "build_ext": {"force": True}}
setup(cffi_modules=MODULES, options=options)
