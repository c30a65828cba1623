# Compiles for another platform with Zig's Clang, whose headers and libraries it brings along. build.py sets these variables.
#
#     ZIG_PYTHON  a Python that has the package ziglang
#     ZIG_TARGET  for example x86_64-linux-gnu.2.28: nothing newer than glibc 2.28 is used
set(CMAKE_SYSTEM_NAME "$ENV{ZIG_SYSTEM}")
set(CMAKE_SYSTEM_PROCESSOR "$ENV{ZIG_PROCESSOR}")
set(CMAKE_CXX_COMPILER "$ENV{ZIG_PYTHON}" -m ziglang c++ -target "$ENV{ZIG_TARGET}")
# No debug information: Zig adds that of its own libraries.
set(CMAKE_SHARED_LINKER_FLAGS_INIT -s)
if(CMAKE_SYSTEM_NAME STREQUAL "Darwin")
    # Else it would be the path of the build.
    string(APPEND CMAKE_SHARED_LINKER_FLAGS_INIT " -Wl,-install_name,@rpath/_native.dylib")
endif()
