# Builds for another system with the compiler and the system headers of zig (pip install ziglang):
#   cmake -S native -B build/x -DCMAKE_TOOLCHAIN_FILE=native/cmake/zig.cmake -DGEMKIT_ZIG_TARGET=aarch64-macos
# A target is ARCHITECTURE-SYSTEM[-ABI]: x86_64-windows-gnu, aarch64-macos, aarch64-linux-gnu.2.28 … Before its first
# link zig compiles the system's libraries, which takes minutes: GEMKIT_COMPILE_ONLY does without. Test programs for
# Windows run in wine where it is installed.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES GEMKIT_ZIG_TARGET GEMKIT_ZIG)
find_package(Python 3 REQUIRED COMPONENTS Interpreter)
if(NOT GEMKIT_ZIG)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import os, ziglang; print(os.path.dirname(ziglang.__file__) + '/zig')"
                  OUTPUT_VARIABLE GEMKIT_ZIG OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT GEMKIT_ZIG_TARGET MATCHES "^(x86_64|aarch64)-(windows|macos|linux)")
  message(FATAL_ERROR "GEMKIT_ZIG_TARGET must be such as x86_64-windows-gnu, not '${GEMKIT_ZIG_TARGET}'")
endif()
set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)  # no link here either
set(zig_systems_windows Windows)
set(zig_systems_macos Darwin)
set(zig_systems_linux Linux)
set(CMAKE_SYSTEM_NAME ${zig_systems_${CMAKE_MATCH_2}})
set(CMAKE_CXX_COMPILER ${GEMKIT_ZIG} c++)
set(CMAKE_CXX_COMPILER_TARGET ${GEMKIT_ZIG_TARGET})
set(CMAKE_CXX_ARCHIVE_CREATE "${GEMKIT_ZIG} ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "")
set(CMAKE_CXX_FLAGS_INIT -fno-sanitize=undefined)  # without optimisation zig adds checks, which take as long again
set(GEMKIT_NEON_FLAGS -mcpu=generic+dotprod)  # zig reads -march as a processor
if(CMAKE_SYSTEM_NAME STREQUAL "Windows")
  find_program(GEMKIT_WINE NAMES wine64 wine)
  if(GEMKIT_WINE)
    set(CMAKE_CROSSCOMPILING_EMULATOR ${GEMKIT_WINE})
  endif()
endif()
