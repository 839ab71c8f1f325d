// A libcuda.so.1 without a GPU: tells on standard output what it is asked for, and has one device.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

typedef unsigned long long address;

int cuGetProcAddress_v2(const char* symbol, void** function, int version, address flags, int* status) {
  char second[100];
  void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  snprintf(second, sizeof second, "%s_v2", symbol);
  *function = dlsym(self, second);
  if (!*function) *function = dlsym(self, symbol);
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}

int cuGetErrorName(int error, const char** name) { return *name = "CUDA_ERROR", 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal ? 101 : 0; }

int cuDeviceGetName(char* name, int length, int device) {
  snprintf(name, length, "Stub %d", device);
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 97 ? 232448 : -1;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)0xC0, 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)0xC0, 0; }
int cuCtxPushCurrent_v2(void* context) { return printf("push %p\n", context), 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = (void*)0xC0, puts("pop"), 0; }

int cuModuleLoadData(void** module, const void* code) {
  printf("load %s\n", (const char*)code);
  *module = (void*)0xA0;
  return strcmp(code, "bad") ? 0 : 200;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  printf("function %p %s\n", module, name);
  *function = (void*)0xF0;
  return 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  return printf("attribute %p %d %d\n", function, attribute, value), 0;
}

int cuMemsetD8Async(address start, unsigned char value, size_t count, void* stream) {
  return printf("set %llx %d %zu %p\n", start, value, count, stream), 0;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra) {
  printf("launch %p %u %u %u %u %u %u %u %p %s\n", function, x, y, z, block_x, block_y, block_z, shared, stream,
         (const char*)parameters[0]);
  return 0;
}
