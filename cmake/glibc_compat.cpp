// What libstdc++ asks of a glibc newer than 2.28, for modules that must run on that one; see glibc.cmake.

// Declared by <sys/single_threaded.h> since glibc 2.32. False: reference counts are always changed atomically.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
