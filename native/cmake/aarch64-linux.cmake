# Builds for 64-bit ARM Linux with Debian's cross compiler (g++-aarch64-linux-gnu) and runs the tests in an emulator
# (qemu-user). Statically linked, so that the emulator needs no ARM libraries.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
find_program(GEMKIT_QEMU NAMES qemu-aarch64 qemu-aarch64-static REQUIRED)
set(CMAKE_CROSSCOMPILING_EMULATOR ${GEMKIT_QEMU} -cpu max)
