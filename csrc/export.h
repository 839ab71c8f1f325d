// Exports a function for Python's ctypes.
#pragma once

#define KCONV_EXPORT extern "C" __attribute__((visibility("default")))
