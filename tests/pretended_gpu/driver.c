/* A CUDA driver that only pretends. It holds no memory and computes nothing, but it refuses what a real driver
 * refuses: grids, blocks and shared memory beyond the GPU's limits, memory that is not on the GPU, and memory,
 * streams and functions of another GPU than the current one. Of machine code it reads what a real one reads: how many
 * bytes of local memory a thread needs. Triton loads it as libcuda.so.1; Python sets the GPUs and reads what was
 * launched. See __init__.py. */
#include "cuda.h"

#include <elf.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_GPUS 8
#define STATIC_LIMIT 49152 /* bytes of shared memory that a function has without asking for more */

typedef struct {
  int major, minor, processors, shared_optin, shared_per_processor;
} Gpu;

/* What a CUmodule and a CUfunction point to. */
typedef struct {
  int device, local_bytes;
} Module;

typedef struct {
  int device, local_bytes, shared_limit;
} Function;

typedef struct {
  unsigned grid[3], threads, shared;
} Launch;

static Gpu gpus[MOST_GPUS];
static int gpu_count = 0, current = 0;
static int host_memory = 0; /* whether kernels may get memory of the host */
static long launch_count = 0;
static Launch last;

/* ---- what Python calls ---- */

void pretend_gpus(int count, const Gpu *which) {
  gpu_count = count;
  memcpy(gpus, which, count * sizeof(Gpu));
}
int pretend_current(int device) {
  int before = current;
  current = device;
  return before;
}
void pretend_host_memory(int allowed) { host_memory = allowed; }
long pretend_launches(void) { return launch_count; }
const Launch *pretend_last_launch(void) { return &last; }

/* ---- devices and contexts: a context is its GPU's number plus one ---- */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = gpu_count;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  if (ordinal < 0 || ordinal >= gpu_count)
    return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device < 0 || device >= gpu_count)
    return CUDA_ERROR_INVALID_DEVICE;
  const Gpu *gpu = &gpus[device];
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = gpu->major; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = gpu->minor; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = gpu->processors; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = gpu->shared_optin; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = gpu->shared_per_processor; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1000; /* clocks and widths, that nobody here relies on */
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)(intptr_t)(current + 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = (int)(intptr_t)context - 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = current;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)(intptr_t)(device + 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **words) {
  switch (error) {
  case CUDA_ERROR_INVALID_VALUE: *words = "invalid argument"; break;
  case CUDA_ERROR_INVALID_DEVICE: *words = "invalid device ordinal"; break;
  case CUDA_ERROR_INVALID_CONTEXT: *words = "memory of another GPU than the current one"; break;
  case CUDA_ERROR_INVALID_HANDLE: *words = "function or stream of another GPU than the current one"; break;
  case CUDA_ERROR_INVALID_IMAGE: *words = "not a kernel image"; break;
  default: *words = "unknown error";
  }
  return CUDA_SUCCESS;
}

/* ---- modules and functions ---- */

#define CUDA_INFO 0x70000000 /* the type of ELF sections that list attributes */
#define FRAME_SIZE 0x11      /* an attribute: a symbol's number, and bytes of local memory */
#define SIZED 4              /* a form of attributes: their size and so many bytes; others have no bytes of their own */

/* The most bytes of local memory that a thread of a function in this image needs: what spilled. 0 if the image is a
 * pretended one (see __init__.py). */
static int local_bytes_of(const uint8_t *image) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  if (image[EI_CLASS] != ELFCLASS64)
    return 0;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  int most = 0;
  for (int number = 0; number < header->e_shnum; number++) {
    if (sections[number].sh_type != CUDA_INFO)
      continue;
    const uint8_t *at = image + sections[number].sh_offset, *end = at + sections[number].sh_size;
    while (at < end) {
      int form = at[0], attribute = at[1], size = form == SIZED ? at[2] | at[3] << 8 : 0;
      if (attribute == FRAME_SIZE && size == 8) {
        uint32_t bytes;
        memcpy(&bytes, at + 8, 4);
        most = (int)bytes > most ? (int)bytes : most;
      }
      at += 4 + size;
    }
  }
  return most;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\177ELF", 4))
    return CUDA_ERROR_INVALID_IMAGE;
  Module *made = malloc(sizeof(Module)); /* as long as the process: so are Triton's */
  *made = (Module){current, local_bytes_of(image)};
  *module = (CUmodule)made;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const Module *from = (const Module *)module;
  Function *made = malloc(sizeof(Function));
  *made = (Function){from->device, from->local_bytes, STATIC_LIMIT};
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  switch ((int)attribute) {
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = ((const Function *)function)->local_bytes; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Function *which = (Function *)function;
  if ((int)attribute == 17) /* Triton 3.9 tries oversized shared memory first: these GPUs have none */
    return CUDA_ERROR_INVALID_VALUE;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return CUDA_SUCCESS;
  if (value > gpus[which->device].shared_optin)
    return CUDA_ERROR_INVALID_VALUE;
  which->shared_limit = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}

/* ---- memory: the highest byte of an address is its GPU's number plus one, and 0 in the host's memory ---- */

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  int device = (int)(pointer >> 56) - 1;
  if (device == -1 && host_memory)
    device = current;
  if (device < 0 || device >= gpu_count)
    return CUDA_ERROR_INVALID_VALUE;
  if (device != current)
    return CUDA_ERROR_INVALID_CONTEXT;
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return CUDA_ERROR_NOT_SUPPORTED;
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

/* ---- launches: a stream is its GPU's number plus one ---- */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const Function *which = (const Function *)function;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (which->device != current || (intptr_t)config->hStream != current + 1)
    return CUDA_ERROR_INVALID_HANDLE;
  if (config->gridDimX == 0 || config->gridDimX > 2147483647u)
    return CUDA_ERROR_INVALID_VALUE;
  if (config->gridDimY == 0 || config->gridDimY > 65535 || config->gridDimZ == 0 || config->gridDimZ > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  if (threads == 0 || threads > 1024 || (int)config->sharedMemBytes > which->shared_limit)
    return CUDA_ERROR_INVALID_VALUE;
  launch_count++;
  last = (Launch){{config->gridDimX, config->gridDimY, config->gridDimZ}, threads, config->sharedMemBytes};
  return CUDA_SUCCESS;
}
