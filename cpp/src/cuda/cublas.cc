// cublas.cc -- finds cuBLAS at run time and calls the few functions that are needed
//
// No header and no link: the wheel serves whatever cuBLAS 12 or later PyTorch has brought along. The declarations below are
// cuBLAS's C interface, stable since version 11.
#include "cuda/cublas.h"

#include <dlfcn.h>

#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "widehead/error.h"

namespace widehead::cuda {
namespace {

using Handle = void*;
enum Operation : int { kNormal = 0, kTransposed = 1 };
enum DataType : int { kF32 = 0, kF64 = 1, kF16 = 2, kBf16 = 14 };
enum ComputeType : int { kCompute32 = 68, kCompute32Tf32 = 77, kCompute64 = 70 };
constexpr int kDefaultAlgorithm = -1;
constexpr int kFullReductions = 16;  // partial sums of 16-bit products stay float32

struct Functions {
  int (*create)(Handle*);
  int (*set_stream)(Handle, void*);
  int (*set_workspace)(Handle, void*, std::size_t);
  int (*set_math_mode)(Handle, int);
  int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
              void*, int, int, int, int);
};

std::mutex g_mutex;
std::string g_path;

constexpr const char* kNames[] = {"libcublas.so.13", "libcublas.so.12"};

// The copy that the process has, so that PyTorch and we share one; else the loader's; else the path we were told.
void* open_library() {
  for (const char* name : kNames)
    if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return library;
  for (const char* name : kNames)
    if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
  std::string tried;
  if (!g_path.empty()) {
    if (void* library = dlopen(g_path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    const char* why = dlerror();
    tried = ", nor at " + g_path + (why ? std::string(" (") + why + ")" : "");
  }
  throw BackendError("cuBLAS was not found" + tried + "; install it with `pip install nvidia-cublas`");
}

template <class F>
void resolve(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (!function) throw BackendError(std::string("cuBLAS lacks ") + name + "; version 12 or later is needed");
}

const Functions& functions() {
  static Functions f;
  static bool loaded = false;
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (!loaded) {
    void* library = open_library();
    resolve(library, "cublasCreate_v2", f.create);
    resolve(library, "cublasSetStream_v2", f.set_stream);
    resolve(library, "cublasSetWorkspace_v2", f.set_workspace);
    resolve(library, "cublasSetMathMode", f.set_math_mode);
    resolve(library, "cublasGemmEx", f.gemm);
    loaded = true;
  }
  return f;
}

const char* words_of(int status) {
  switch (status) {
    case 1: return "not initialized";
    case 3: return "allocation failed";
    case 7: return "invalid value";
    case 8: return "architecture mismatch";
    case 13: return "execution failed";
    case 14: return "internal error";
    case 15: return "not supported";
    default: return "unknown";
  }
}

void expect(int status, const char* what, const char* type = nullptr) {
  if (status != 0)
    throw BackendError(std::string("cuBLAS: ") + what + (type ? std::string(" of ") + type : "") +
                       " failed with status " + std::to_string(status) + " (" + words_of(status) + ")");
}

// Creating a handle allocates, which is forbidden while any thread captures a graph, unless this thread says that
// what it allocates is no part of it.
class Uncaptured {
 public:
  Uncaptured() { WIDEHEAD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~Uncaptured() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  Uncaptured(const Uncaptured&) = delete;
  Uncaptured& operator=(const Uncaptured&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A handle serves one thread at a time and has memory on the device: a thread keeps those it has used, and leaves them
// to others when it ends. They are never destroyed: at the end of the process the driver may be gone before us.
struct Idle {
  std::mutex mutex;
  std::map<int, std::vector<Handle>> handles;  // of each device
};
Idle& idle() {
  static Idle* const one = new Idle;  // outlives the threads
  return *one;
}
struct Held {
  std::map<int, Handle> handles;
  ~Held() {
    const std::lock_guard<std::mutex> lock(idle().mutex);
    for (const auto& [device, handle] : handles) idle().handles[device].push_back(handle);
  }
};

Handle new_handle(int device) {
  {
    const std::lock_guard<std::mutex> lock(idle().mutex);
    std::vector<Handle>& left = idle().handles[device];
    if (!left.empty()) {
      const Handle handle = left.back();
      left.pop_back();
      return handle;
    }
  }
  const Uncaptured guard;
  Handle handle = nullptr;
  expect(functions().create(&handle), "cublasCreate");
  expect(functions().set_math_mode(handle, kFullReductions), "cublasSetMathMode");
  return handle;
}

Handle handle_of(int device) {
  thread_local Held held;
  const auto found = held.handles.find(device);
  return found != held.handles.end() ? found->second : held.handles[device] = new_handle(device);
}

DataType data_type(Dtype t) {
  switch (t) {
    case Dtype::f64: return kF64;
    case Dtype::bf16: return kBf16;
    case Dtype::f16: return kF16;
    default: return kF32;
  }
}

int narrow(std::int64_t n, const char* what) {
  if (n < 0 || n > std::numeric_limits<int>::max())
    throw CapacityError(std::string("cuBLAS takes 32-bit sizes, got ") + what + " " + std::to_string(n));
  return static_cast<int>(n);
}

}  // namespace

void set_cublas_path(const std::string& path) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_path = path;
}

Cublas::Cublas(const Device& device, void* workspace) : handle_(handle_of(device.index)) {
  const Functions& f = functions();
  expect(f.set_stream(handle_, device.stream), "cublasSetStream");
  expect(f.set_workspace(handle_, workspace, static_cast<std::size_t>(kCublasWorkspace)), "cublasSetWorkspace");
}

void Cublas::multiply(const Product& p) const {
  if (p.m == 0 || p.n == 0) return;
  const bool wide = p.factors == Dtype::f64;
  const float one = 1, beta = p.accumulate ? 1.0f : 0.0f;
  const double one_wide = 1, beta_wide = p.accumulate ? 1.0 : 0.0;
  const ComputeType compute = wide ? kCompute64 : p.tf32 && p.factors == Dtype::f32 ? kCompute32Tf32 : kCompute32;
  const auto operation = [](const Operand& o) { return o.transposed ? kTransposed : kNormal; };
  // cuBLAS is column-major: it sees the transposes, and C' = B' A'.
  expect(functions().gemm(handle_, operation(p.b), operation(p.a), narrow(p.n, "n"), narrow(p.m, "m"), narrow(p.k, "k"),
                          wide ? static_cast<const void*>(&one_wide) : &one, p.b.data, data_type(p.factors),
                          narrow(p.b.stride, "stride"), p.a.data, data_type(p.factors), narrow(p.a.stride, "stride"),
                          wide ? static_cast<const void*>(&beta_wide) : &beta, p.c, data_type(p.result),
                          narrow(p.c_stride, "stride"), compute, kDefaultAlgorithm),
         "cublasGemmEx", name_of(p.factors));
}

}  // namespace widehead::cuda
