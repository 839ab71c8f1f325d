// Converts errors of torch's C interface to exceptions with torch's message.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

// New in torch 2.13; null in older versions.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace kconv {

inline std::string torch_reason(const char* what) {
  const bool told = torch_exception_get_what_without_backtrace != nullptr;
  return told ? torch_exception_get_what_without_backtrace()
              : std::string("torch could not ") + what + "; its reason is printed above";
}

inline void check_torch(int error, const char* what) {
  if (error != 0) throw std::runtime_error(torch_reason(what));
}

// Calls a function of torch's stable headers, whose own exceptions only name a line in those headers.
template <typename Function>
auto telling(const char* what, Function function) {
  try {
    return function();
  } catch (const std::exception&) {
    throw std::runtime_error(torch_reason(what));
  }
}

}  // namespace kconv
