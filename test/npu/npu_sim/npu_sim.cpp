// An emulated Ascend device for tests: PrivateUse1 tensors whose bytes live in host memory.
// No Python.h and no pybind: loaded with torch.ops.load_library, driven through the operators at the end of this file.
//
// Environment, read once:
//   NPU_SIM_DEVICES=2     how many devices there are
//   NPU_SIM_DENY=a,b      operators that this "version of CANN" lacks, e.g. aten::topk
//   NPU_SIM_SATURATE=1    a chip without an INF/NAN mode: inf becomes the largest number and nan 0 in every result, a
//                         flag remembers it, and the check of gradients reads that flag and not the gradients
//   NPU_SIM_FP32_AS_FP16=1  matrix products and convolutions of fp32 run in fp16 until keep_origin_dtype() (910A)
//   NPU_SIM_AFFINITY=1    opening a device binds the process to its share of the cores (CPU_AFFINITY_CONF, CANN 8.0)
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/UnaryOps.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sched.h>
#include <torch/library.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace npu_sim {
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IntArrayRef;

constexpr auto kNPU = c10::DeviceType::PrivateUse1;
constexpr size_t kTotalMemory = 32ull << 30;
constexpr int kMostDevices = 64;

static int env_int(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

static std::set<std::string> env_set(const char* name) {
  const char* text = std::getenv(name);
  std::set<std::string> words;
  std::string word;
  for (char c : std::string(text ? text : "") + ",") {
    if (c != ',') word += c;
    else if (!word.empty()) words.insert(std::exchange(word, ""));
  }
  return words;
}

// ---------------------------------------------------------------- devices
// A thread has no device until it sets one, or asks: then it opens device 0.
static thread_local DeviceIndex chosen_index = -1;
static std::atomic<bool> opened[kMostDevices];

static DeviceIndex current_index() {
  if (chosen_index < 0) opened[chosen_index = 0] = true;
  return chosen_index;
}

static DeviceIndex device_count() {
  static const int count = std::min(env_int("NPU_SIM_DEVICES", 2), kMostDevices);
  return count;
}

static void set_device(int64_t index) {
  TORCH_CHECK(index >= 0 && index < device_count(),
              "npu_sim: invalid device ordinal ", index, ", ", (int)device_count(), " devices");
  chosen_index = index;
}

static void bind_to_share_of_cores() {
  cpu_set_t mine, share;
  if (!env_int("NPU_SIM_AFFINITY", 0) || sched_getaffinity(0, sizeof mine, &mine)) return;
  const int most = std::max(1, CPU_COUNT(&mine) / device_count());
  CPU_ZERO(&share);
  for (int core = 0, taken = 0; core < CPU_SETSIZE && taken < most; ++core)
    if (CPU_ISSET(core, &mine)) CPU_SET(core, &share), ++taken;
  sched_setaffinity(0, sizeof share, &share);
}

static void open_device(int64_t index) {
  set_device(index);
  static const bool bound = (bind_to_share_of_cores(), true);
  (void)bound;
  opened[index] = true;
}

static DeviceIndex or_current(DeviceIndex index) { return index < 0 ? current_index() : index; }
static Device current() { return Device(kNPU, current_index()); }

static Device chosen(std::optional<Device> device) {
  const Device d = device.value_or(current());
  TORCH_CHECK(d.is_privateuseone(), "npu_sim: not an npu device: ", d);
  return d.has_index() ? d : current();
}

// ---------------------------------------------------------------- memory
struct Usage { int64_t now = 0, peak = 0; };
static std::mutex mutex;  // of usage, pinned and calls
static Usage usage[kMostDevices];
static std::map<uintptr_t, size_t> pinned;

struct Block { void* bytes; size_t size; DeviceIndex index; };

static void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(mutex);
    usage[block->index].now -= block->size;
  }
  std::free(block->bytes);
  delete block;
}

static c10::DataPtr allocate_on(size_t size, DeviceIndex index) {
  static const pid_t owner = getpid();
  TORCH_CHECK(owner == getpid(), "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you "
                                 "must use the 'spawn' start method");
  if (!size) return {nullptr, Device(kNPU, index)};
  opened[index] = true;
  void* bytes = nullptr;
  TORCH_CHECK(posix_memalign(&bytes, 64, size) == 0, "npu_sim: out of memory");
  std::memset(bytes, 0xFF, size);  // NaN in every floating type: a torch.empty() that nobody fills shows
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto& u = usage[index];
    u.now += size;
    u.peak = std::max(u.peak, u.now);
  }
  return {bytes, new Block{bytes, size, index}, &free_block, Device(kNPU, index)};
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override { return allocate_on(size, current_index()); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex index) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto& bytes = stats.allocated_bytes[0];
    bytes.current = usage[index].now;
    bytes.peak = usage[index].peak;
    stats.reserved_bytes[0] = bytes;
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex index) override { usage[index].peak = usage[index].now; }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex index) override {
    return {kTotalMemory - usage[index].now, kTotalMemory};
  }
};
static Allocator allocator;
REGISTER_ALLOCATOR(kNPU, &allocator);

struct PinnedAllocator final : c10::Allocator {
  static void release(void* bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      pinned.erase(reinterpret_cast<uintptr_t>(bytes));
    }
    std::free(bytes);
  }
  c10::DataPtr allocate(size_t size) override {
    size = std::max<size_t>(size, 1);
    void* bytes = nullptr;
    TORCH_CHECK(posix_memalign(&bytes, 64, size) == 0, "npu_sim: out of memory");
    std::lock_guard<std::mutex> lock(mutex);
    pinned[reinterpret_cast<uintptr_t>(bytes)] = size;
    return {bytes, bytes, &release, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
};
static PinnedAllocator pinned_allocator;

// ---------------------------------------------------------------- random generators
// A CPU engine that says it lives on npu:i. The kernels draw from `engine`.
struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(DeviceIndex index) : engine(at::detail::createCPUGenerator()) {
    device_ = Device(kNPU, index);
    key_set_ = DispatchKeySet(DispatchKey::PrivateUse1);
  }
  at::Generator engine;
  void set_current_seed(uint64_t seed) override { engine.set_current_seed(seed); }
  uint64_t current_seed() const override { return engine.current_seed(); }
  uint64_t seed() override { return engine.seed(); }
  void set_state(const c10::TensorImpl& state) override { engine.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return engine.unsafeGetGeneratorImpl()->get_state();
  }
};

static at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < device_count(); ++i) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return generators.at(or_current(index));
}

// ---------------------------------------------------------------- what torch asks a device for
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  void setCurrentDevice(DeviceIndex index) const override { set_device(index); }
  DeviceIndex getCurrentDevice() const override { return current_index(); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    const auto before = current_index();
    set_device(index);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index = -1) const override {
    return at::make_generator<Generator>(or_current(index));
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* pointer) const override {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    std::lock_guard<std::mutex> lock(mutex);
    auto after = pinned.upper_bound(address);
    return after != pinned.begin() && (--after, address < after->first + after->second);
  }
  Device getDeviceFromPtr(void*) const override { return current(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto bytes = allocate_on(size, storage.device().index());
    if (storage.data()) std::memcpy(bytes.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(bytes));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// Streams have names and an order of one: everything here is finished when the call returns.
static thread_local c10::StreamId current_stream[kMostDevices] = {0};

static double milliseconds() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kNPU;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kNPU; }
  Device exchangeDevice(Device device) const override {
    const auto before = current();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return current(); }
  void setDevice(Device device) const override {
    if (device.index() >= 0) set_device(device.index());
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) chosen_index = device.index();
  }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }

  static c10::Stream stream(Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, Device(kNPU, or_current(device.index())), id);
  }
  c10::Stream getStream(Device device) const override {
    return stream(device, current_stream[or_current(device.index())]);
  }
  c10::Stream getDefaultStream(Device device) const override { return stream(device, 0); }
  c10::Stream getStreamFromGlobalPool(Device device, bool = false) const override { return getNewStream(device); }
  c10::Stream getNewStream(Device device, int = 0) const override {
    static std::atomic<int64_t> made{0};
    return stream(device, ++made);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = getStream(next.device());
    current_stream[next.device_index()] = next.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}

  // An event is the time at which it was recorded.
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new double;
    *static_cast<double*>(*event) = milliseconds();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<double*>(event); }
  double elapsedTime(void* from, void* to, const DeviceIndex) const override {
    return *static_cast<double*>(to) - *static_cast<double*>(from);
  }
  c10::DeviceCapability getDeviceCapability(Device) const override { return c10::DeviceCapability(); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---------------------------------------------------------------- the same bytes, seen from the other side
static Tensor make_tensor(c10::Storage storage, DispatchKey key, const Tensor& like) {
  auto t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  t._set_conj(like.is_conj());
  t._set_neg(like.is_neg());
  return t;
}

// A CPU tensor over the bytes of an npu tensor; keeps those bytes alive.
static Tensor as_cpu(const Tensor& t) {
  if (!t.defined() || !t.is_privateuseone()) return t;
  auto* keep = new c10::Storage(t.storage());
  c10::DataPtr bytes(keep->mutable_data(), keep, [](void* k) { delete static_cast<c10::Storage*>(k); },
                     Device(c10::kCPU));
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), keep->nbytes(),
                                                             std::move(bytes), nullptr, false));
  return make_tensor(std::move(storage), DispatchKey::CPU, t);
}

// Chips without an INF/NAN mode have no inf and no nan: what would be one is cut, and a flag of the device remembers it.
static const bool saturates = env_int("NPU_SIM_SATURATE", 0);
static std::atomic<bool> overflow_flag{false};

static const Tensor& saturate(const Tensor& result) {
  if (saturates && result.defined() && at::isFloatingType(result.scalar_type()) &&
      !at::isfinite(result).all().item<bool>()) {
    overflow_flag = true;
    at::nan_to_num_(const_cast<Tensor&>(result), 0.0);
  }
  return result;
}

// found_inf is added to, and gradients stay scaled where the flag is set.
static void check_flag_and_unscale(at::TensorList grads, Tensor found_inf, const Tensor& inv_scale) {
  if (overflow_flag.exchange(false)) found_inf.add_(1);
  else for (Tensor grad : grads) grad.mul_(inv_scale);
}

// The first generation computes fp32 products in fp16 unless ACL_PRECISION_MODE says otherwise.
static std::atomic<bool> fp32_as_fp16{env_int("NPU_SIM_FP32_AS_FP16", 0) != 0};

static Tensor as_computed(const Tensor& t) {
  return fp32_as_fp16 && t.defined() && t.scalar_type() == at::kFloat ? t.to(at::kHalf).to(at::kFloat) : t;
}

// A new npu tensor that holds what a CPU kernel returned.
static Tensor to_npu(const Tensor& result, Device device) {
  if (!result.defined()) return result;
  c10::DeviceGuard guard(device);
  Tensor t = at::detail::empty_strided_generic(result.sizes(), result.strides(), &allocator,
                                             DispatchKeySet(DispatchKey::PrivateUse1), result.scalar_type());
  auto bytes = as_cpu(t);
  saturate(bytes.copy_(result));
  return t;
}

// ---------------------------------------------------------------- what was called, for the list of operators
static std::map<std::pair<std::string, std::string>, int64_t> calls;

static void note(const std::string& name, const Tensor& t) {
  std::lock_guard<std::mutex> lock(mutex);
  ++calls[{name, t.defined() ? c10::toString(t.scalar_type()) : "-"}];
}

// ---------------------------------------------------------------- kernels that cannot be a CPU kernel's
static void check_factory(std::optional<c10::Layout> layout, std::optional<bool> pin) {
  TORCH_CHECK(!layout || *layout == c10::kStrided, "npu_sim: only strided tensors");
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
}

static Tensor empty_memory_format(IntArrayRef size, std::optional<at::ScalarType> dtype,
                                  std::optional<c10::Layout> layout, std::optional<Device> device,
                                  std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  check_factory(layout, pin);
  TORCH_CHECK(!format || *format == c10::MemoryFormat::Contiguous || *format == c10::MemoryFormat::Preserve,
              "Only support contiguous_format or preserve_format, ERR01007 OPS feature not supported");
  c10::DeviceGuard guard(chosen(device));
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

static Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<c10::Layout> layout, std::optional<Device> device, std::optional<bool> pin) {
  check_factory(layout, pin);
  c10::DeviceGuard guard(chosen(device));
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

static Tensor view(const Tensor& self, IntArrayRef size) { return at::native::view(self, size); }

static Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

static Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

static Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

static const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}

static Tensor& set_storage(Tensor& self, c10::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  const auto contiguous = c10::contiguous_strides(size);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      size, stride.size() == size.size() ? stride : IntArrayRef(contiguous), offset);
  return self;
}

static Tensor& set_whole_storage(Tensor& self, c10::Storage storage) {
  const int64_t elements = storage.nbytes() / self.element_size();
  return set_storage(self, std::move(storage), 0, {elements}, {1});
}

static Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

static Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  note("aten::copy_", target);
  auto bytes = as_cpu(target);
  saturate(bytes.copy_(as_cpu(source)));
  return target;
}

static Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  as_cpu(target).copy_(as_cpu(source));
  return target;
}

static void record_stream(Tensor&, c10::Stream) {}

// torch_npu answers so too: `parameter.data = npu_tensor` works and module.to("npu") keeps its Parameter objects.
static bool has_compatible_shallow_copy_type(const Tensor& a, const Tensor& b) {
  auto dense = [](const Tensor& t) { return t.layout() == c10::kStrided && (t.is_cpu() || t.is_privateuseone()); };
  return a.key_set() == b.key_set() || (dense(a) && dense(b));
}

static void check_same_device(std::optional<Device>& seen, Device device, const std::string& name) {
  TORCH_CHECK(!seen || *seen == device, "Expected all tensors to be on the same device, but found at least two devices, ",
              *seen, " and ", device, "! (", name, ")");
  seen = device;
}

// ATen sends the convolutions of an out-of-tree device to these two. In fp16 a CPU convolves about twenty times slower
// than in fp32, and an NPU accumulates in fp32 anyway.
static Tensor for_convolution(const Tensor& t) {
  return t.defined() && t.scalar_type() == at::kHalf ? as_cpu(t).to(at::kFloat) : as_computed(as_cpu(t));
}

static Tensor from_convolution(const Tensor& result, const Tensor& like) {
  return to_npu(result.defined() ? result.to(like.scalar_type()) : result, like.device());
}

static Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed,
                          IntArrayRef output_padding, int64_t groups) {
  std::optional<Device> device;
  for (const auto& t : {input, weight, bias.value_or(Tensor())})
    if (t.defined()) check_same_device(device, t.device(), "convolution");
  note("aten::convolution", input);
  at::AutoDispatchBelowADInplaceOrView guard;
  std::optional<Tensor> cpu_bias;
  if (bias && bias->defined()) cpu_bias = for_convolution(*bias);
  return from_convolution(at::convolution(for_convolution(input), for_convolution(weight), cpu_bias, stride, padding,
                                          dilation, transposed, output_padding, groups), input);
}

static std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  std::optional<Device> device;
  for (const auto& t : {grad, input, weight}) check_same_device(device, t.device(), "convolution_backward");
  note("aten::convolution_backward", input);
  at::AutoDispatchBelowADInplaceOrView guard;
  const IntArrayRef bias_size{weight.size(transposed ? 1 : 0) * (transposed ? groups : 1)};
  auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(
      for_convolution(grad), for_convolution(input), for_convolution(weight), bias_size, stride, padding, dilation,
      transposed, output_padding, groups, wanted);
  return {from_convolution(grad_input, input), from_convolution(grad_weight, input),
          from_convolution(grad_bias, input)};
}

// ---------------------------------------------------------------- every other operator: the CPU's kernel on these bytes
struct Call {
  const std::string& name;
  std::optional<Device> device;
  Tensor first;                                   // names the dtype in the list of operators
  bool float64 = false;
  std::vector<std::pair<Tensor, Tensor>> aliases;  // (npu tensor, the CPU tensor over its bytes)

  Tensor argument(const Tensor& t) {
    // On the host may stay: numbers of no dimension, and indices, as on CUDA and Ascend.
    static const std::set<std::string> host_indices = {"aten::index", "aten::index_put", "aten::index_put_",
                                                       "aten::_index_put_impl_"};
    if (!t.defined()) return t;
    if (!t.is_privateuseone()) {
      TORCH_CHECK(t.dim() == 0 || host_indices.count(name),
                  "Expected all tensors to be on the same device, but found at least two devices, ", current(), " and ",
                  t.device(), "! (", name, ")");
      return t;
    }
    check_same_device(device, t.device(), name);
    if (!first.defined()) first = t;
    float64 |= t.scalar_type() == at::kDouble;
    aliases.emplace_back(t, as_cpu(t));
    return aliases.back().second;
  }

  Tensor result(const Tensor& t) const {
    if (!t.defined()) return t;
    for (const auto& [npu, cpu] : aliases)
      if (cpu.is_same(t)) return saturate(t), npu;  // in place, or out=
    for (const auto& [npu, cpu] : aliases)
      if (t.has_storage() && t.storage().nbytes() &&
          t.storage().unsafeGetStorageImpl() == cpu.storage().unsafeGetStorageImpl())
        return make_tensor(npu.storage(), DispatchKey::PrivateUse1, t);  // a view of an argument
    return to_npu(t, *device);
  }
};

static bool is_optional_generator(const c10::Argument& argument) {
  const auto& type = *argument.type();
  return type.kind() == c10::TypeKind::OptionalType &&
         type.castRaw<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> denied = env_set("NPU_SIM_DENY");
  static const std::set<std::string> products = {"aten::mm", "aten::addmm", "aten::bmm", "aten::_addmm_activation"};
  const auto& schema = op.schema();
  TORCH_CHECK_NOT_IMPLEMENTED(!denied.count(schema.name()) && op.hasKernelForDispatchKey(DispatchKey::CPU),
                              "Could not run '", op.operator_name(),
                              "' with arguments from the 'npu' backend (npu_sim: no such kernel)");
  Call call{schema.name()};
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  std::vector<std::pair<Tensor, Tensor>> resized;  // out= arguments of size zero, which the kernel may resize
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      const auto t = value.toTensor();
      if (schema.arguments()[i].is_out() && t.defined() && t.is_privateuseone() && t.numel() == 0) {
        auto cpu = at::empty({0}, t.options().device(c10::kCPU));
        check_same_device(call.device, t.device(), call.name);
        resized.emplace_back(t, cpu);
        call.aliases.emplace_back(t, cpu);
        value = cpu;
      } else {
        value = call.argument(t);
        if (products.count(call.name) && !schema.arguments()[i].is_out()) value = as_computed(value.toTensor());
      }
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(call.argument(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorList())
        list.push_back(t ? std::optional<Tensor>(call.argument(*t)) : t);
      value = list;
    } else if (value.isDevice() && value.toDevice().is_privateuseone()) {
      call.device = chosen(value.toDevice());
      value = Device(c10::kCPU);
    } else if (value.isGenerator()) {
      const auto* generator = dynamic_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(generator, "Expected a 'npu' device type for generator but found '", value.toGenerator().device(), "'");
      value = generator->engine;
    }
  }
  if (!call.device) call.device = current();
  for (size_t i = 0; i < count; ++i)  // generator=None draws from the device's own
    if ((*stack)[begin + i].isNone() && is_optional_generator(schema.arguments()[i])) {
      auto* generator = default_generator(call.device->index()).unsafeGetGeneratorImpl();
      (*stack)[begin + i] = static_cast<Generator*>(generator)->engine;
    }
  TORCH_CHECK(!(call.float64 && products.count(call.name)), "npu_sim: ", call.name,
              " has no float64 kernel on Ascend");
  note(call.name, call.first);
  {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (saturates && call.name == "aten::_amp_foreach_non_finite_check_and_unscale_") {
      check_flag_and_unscale((*stack)[begin].toTensorVector(), (*stack)[begin + 1].toTensor(),
                             (*stack)[begin + 2].toTensor());
      stack->resize(begin);
    } else {
      op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
    }
  }
  for (const auto& [npu, cpu] : resized) {
    npu.resize_(cpu.sizes());
    as_cpu(npu).copy_(cpu);
  }
  const size_t results = schema.returns().size(), first_result = stack->size() - results;
  for (size_t i = 0; i < results; ++i) {
    auto& value = (*stack)[first_result + i];
    if (value.isTensor()) {
      value = call.result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(call.result(t));
      value = list;
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_memory_format);
  m.impl("empty_strided", empty_strided);
  m.impl("view", view);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("record_stream", record_stream);
  m.impl("_has_compatible_shallow_copy_type", has_compatible_shallow_copy_type);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

// copy_ resolves lazy conj and neg bits itself; without these two, resolving them recurses for ever through _copy_from.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
}  // namespace npu_sim

// ---------------------------------------------------------------- autocast("npu"): ATen's own lists, in their namespace
namespace at::autocast {
static Tensor refuse_binary_cross_entropy(const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t) {
  TORCH_CHECK(false, "binary_cross_entropy is unsafe to autocast; use binary_cross_entropy_with_logits");
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define NPU_SIM_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define NPU_SIM_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define NPU_SIM_SET_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define NPU_SIM_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(NPU_SIM_LOWER)
  AT_FORALL_FP32(NPU_SIM_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(NPU_SIM_SET_DTYPE)
  AT_FORALL_PROMOTE(NPU_SIM_PROMOTE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  m.impl("binary_cross_entropy", refuse_binary_cross_entropy);
}
}  // namespace at::autocast

// ---------------------------------------------------------------- what the Python half calls
namespace npu_sim {
static Tensor cpu_view(const Tensor& t) {
  at::NoGradGuard guard;
  return as_cpu(t);
}

static std::vector<std::string> list_calls() {  // "operator dtype count"
  std::lock_guard<std::mutex> lock(mutex);
  std::vector<std::string> lines;
  for (const auto& [key, count] : calls) lines.push_back(key.first + " " + key.second + " " + std::to_string(count));
  return lines;
}

TORCH_LIBRARY(npu_sim, m) {
  m.def("init", [] {
    static Hooks* hooks = nullptr;
    if (!hooks) at::RegisterPrivateUse1HooksInterface(hooks = new Hooks);
  });
  m.def("set_device", [](int64_t index) { open_device(index); });
  m.def("current_device", []() -> int64_t { return current_index(); });
  m.def("device_count", []() -> int64_t { return device_count(); });
  m.def("default_generator", [](int64_t index) { return default_generator(index); });
  m.def("memory", [](int64_t index) { return usage[index].now; });
  m.def("peak_memory", [](int64_t index) { return usage[index].peak; });
  m.def("reset_peak_memory", [](int64_t index) { usage[index].peak = usage[index].now; });
  m.def("total_memory", []() -> int64_t { return kTotalMemory; });
  m.def("saturates", []() -> bool { return saturates; });
  m.def("keep_origin_dtype", [](bool keep) { fp32_as_fp16 = !keep; });
  m.def("opened", [] {
    std::vector<int64_t> list;
    for (int i = 0; i < device_count(); ++i) if (opened[i]) list.push_back(i);
    return list;
  });
  m.def("overflow_flag", []() -> bool { return overflow_flag; });
  m.def("clear_overflow_flag", [] { overflow_flag = false; });
  m.def("calls", list_calls);
  m.def("clear_calls", [] { std::lock_guard<std::mutex> lock(mutex); calls.clear(); });
  m.def("cpu_view(Tensor t) -> Tensor");  // shares memory: for the emulated hccl alone
}
TORCH_LIBRARY_IMPL(npu_sim, PrivateUse1, m) { m.impl("cpu_view", cpu_view); }
TORCH_LIBRARY_IMPL(npu_sim, AutogradPrivateUse1, m) { m.impl("cpu_view", torch::CppFunction::makeFallthrough()); }
}  // namespace npu_sim
