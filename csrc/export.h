// What Python's ctypes calls.
#pragma once

#define KCONV_EXPORT extern "C" __attribute__((visibility("default")))
