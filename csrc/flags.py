"""What every build of the native code is compiled with. Read by `runpy.run_path`: setup.py can't import the package."""

TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest torch that the binaries have to load on
