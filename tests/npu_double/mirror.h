// One mirrored kernel of the NPU double: what it is, and how it runs.
//
// A mirror runs the CPU kernel on aliases of "device" memory, so that in-place
// operators stay in place, and with the device's own generator, so that
// paddle.get_rng_state() governs dropout.  Where the CPU has no float16 or
// bfloat16 variant, the float32 kernel runs on widened copies and its results
// are rounded back: the arithmetic is not that of a real board.
//
// Knows neither registration (npu_double_kernels.cc) nor how paddle calls a
// kernel (entry.h).
#pragma once
#if !defined(__x86_64__) || !defined(__linux__)
#error "the NPU double's kernels know the x86-64 System V convention only"
#endif
#include "numbers.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <typeindex>
#include <utility>
#include <vector>

#include "paddle/phi/backends/cpu/cpu_context.h"
#include "paddle/phi/core/dense_tensor.h"
#include "paddle/phi/core/generator.h"
#include "paddle/phi/core/kernel_context.h"
#include "paddle/phi/core/kernel_factory.h"
#include "paddle/phi/core/selected_rows.h"
#include "paddle/phi/core/tensor_utils.h"

namespace {

using phi::AttributeType;
using phi::Backend;
using phi::DenseTensor;
using phi::DeviceContext;
using phi::KernelContext;
using phi::KernelKey;
using phi::SelectedRows;
using phi::TensorBase;

enum class Arg { kDense, kOptional, kList, kOptionalList, kRows, kUnknown };

Arg Classify(const std::type_index& t) {
  auto is = [&t](const std::type_info& u) { return t == std::type_index(u); };
  if (is(typeid(const DenseTensor&)) || is(typeid(DenseTensor*)))
    return Arg::kDense;
  if (is(typeid(const paddle::optional<DenseTensor>&))) return Arg::kOptional;
  if (is(typeid(const std::vector<const DenseTensor*>&)) ||
      is(typeid(std::vector<DenseTensor*>)))
    return Arg::kList;
  if (is(typeid(const paddle::optional<std::vector<const DenseTensor*>>&)))
    return Arg::kOptionalList;
  if (is(typeid(const SelectedRows&)) || is(typeid(SelectedRows*)))
    return Arg::kRows;
  return Arg::kUnknown;
}

struct Mirror {
  std::string name;
  phi::Kernel cpu;
  bool widen = false;
  bool overwrites = false;  // see Call::OverwriteRepeated
  bool rounds = false;      // see RoundToTf32
  DataType dtype = DataType::UNDEFINED;
  std::vector<Arg> inputs, outputs;
  std::vector<AttributeType> attrs;
  size_t calls = 0;  // since its name was last read
  size_t total = 0;
};

constexpr size_t kSlots = 8192;  // as many as the stubs below
std::vector<Mirror>& Mirrors() {
  static auto* all = new std::vector<Mirror>();
  return *all;
}

// Index of the float32 master copy among an optimizer's inputs, or -1.  The CPU
// kernels ignore it, and the last output, which is the new master copy.
int MasterInput(const std::string& kernel) {
  static const std::map<std::string, int> where = {
      {"adam", 8}, {"adamw", 8}, {"momentum", 4}, {"sgd", 3}};
  auto it = where.find(kernel);
  return it == where.end() ? -1 : it->second;
}

// Operators whose float32 operands a board may round.
bool IsProduct(const std::string& kernel) {
  static const std::set<std::string> names = {
      "addmm", "addmm_grad", "baddbmm", "baddbmm_grad", "bmm", "bmm_grad",
      "conv2d", "conv2d_grad", "matmul", "matmul_grad", "matmul_with_flatten",
      "matmul_with_flatten_grad", "mv", "mv_grad"};
  return names.count(kernel) > 0;
}

// Optimizers whose master copy is not handled: no fp16/bf16 for them, which
// fails loudly, rather than a master copy that silently never moves.
bool FloatOnly(const std::string& kernel) {
  static const std::set<std::string> names = {
      "adadelta", "adagrad", "adamax", "asgd", "lamb", "merged_adam",
      "merged_momentum", "nadam", "radam", "rmsprop", "rprop"};
  return names.count(kernel) > 0;
}

// The CPU context kernels run in: CPU allocators, but the device's generator.
const phi::CPUContext& Shim(const DeviceContext& dev) {
  const phi::Place& place = dev.GetPlace();
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<phi::CPUContext>> shims;
  std::lock_guard<std::mutex> lock(mutex);
  auto& slot = shims[place.GetDeviceId()];
  if (!slot) {
    auto* generator =
        phi::DefaultCustomDeviceGenerator(
            phi::CustomPlace(place.GetDeviceType(), place.GetDeviceId()))
            .get();
    slot = std::make_unique<phi::CPUContext>(phi::CPUPlace());
    slot->SetAllocator(&dev.GetHostAllocator());
    slot->SetHostAllocator(&dev.GetHostAllocator());
    slot->SetZeroAllocator(&dev.GetHostZeroAllocator());
    slot->SetHostZeroAllocator(&dev.GetHostZeroAllocator());
    slot->SetGenerator(generator);
    slot->SetHostGenerator(generator);
  }
  return *slot;
}

// Spelled MutableInputAt in 3.3.1 and MutableIutputAt in 3.0.0.
template <typename Context>
auto InputOf(Context* c, int i, int) -> decltype(c->MutableInputAt(i)) {
  return c->MutableInputAt(i);
}
template <typename Context>
auto InputOf(Context* c, int i, ...) -> decltype(c->MutableIutputAt(i)) {
  return c->MutableIutputAt(i);
}

// One execution of a mirrored kernel.
class Call {
 public:
  Call(Mirror* m, const DeviceContext& dev)
      : m_(*m), dev_(dev), cpu_(Shim(dev)) {
    ++m->calls;
    ++m->total;
  }

  void Run(KernelContext* given) {
    KernelContext own(const_cast<phi::CPUContext*>(&cpu_));
    const int master = MasterInput(m_.name);
    const TensorBase* master_in = nullptr;
    if (master >= 0) {
      auto range = given->InputRangeAt(master);
      master_in = InputOf(given, range.first, 0);
    }
    widen_ = m_.widen;
    for (size_t i = 0; i < m_.inputs.size(); ++i) {
      auto range = given->InputRangeAt(i);
      paddle::small_vector<const TensorBase*> list;
      for (int j = range.first; j < range.second; ++j) {
        const TensorBase* t = InputOf(given, j, 0);
        if (i == 0 && master_in != nullptr) t = master_in;
        list.push_back(Input(t));
      }
      if (m_.inputs[i] == Arg::kList || m_.inputs[i] == Arg::kOptionalList)
        own.EmplaceBackInputs(list);
      else
        own.EmplaceBackInput(list.empty() ? nullptr : list[0]);
    }
    for (size_t i = 0; i < given->AttrsSize(); ++i) {
      phi::Attribute a = given->AttrAt(i);
      if (widen_ && m_.attrs[i] == AttributeType::DATA_TYPE &&
          Narrow(paddle::get<DataType>(a)))
        a = DataType::FLOAT32;
      own.EmplaceBackAttr(a);
    }
    for (size_t i = 0; i < m_.outputs.size(); ++i) {
      auto range = given->OutputRangeAt(i);
      paddle::small_vector<TensorBase*> list;
      for (int j = range.first; j < range.second; ++j) {
        TensorBase* t = given->MutableOutputAt(j);
        list.push_back(Output(t, i == 0 && master_in != nullptr));
      }
      if (m_.outputs[i] == Arg::kList)
        own.EmplaceBackOutputs(list);
      else
        own.EmplaceBackOutput(list.empty() ? nullptr : list[0]);
    }
    m_.cpu(&own);
    if (m_.overwrites) OverwriteRepeated(&own);
    for (auto& pair : results_) Return(pair.first, pair.second);
    for (auto& pair : rows_results_) {
      pair.first->set_rows(pair.second->rows());
      pair.first->set_height(pair.second->height());
      Return(pair.first->mutable_value(), pair.second->mutable_value());
    }
    if (master_in != nullptr) {
      auto range = given->OutputRangeAt(m_.outputs.size() - 1);
      auto* kept =
          static_cast<DenseTensor*>(given->MutableOutputAt(range.first));
      if (kept != nullptr && !results_.empty()) {
        const DenseTensor& fresh = *results_.front().second;
        void* to = dev_.Alloc(kept, DataType::FLOAT32);
        std::memcpy(to, fresh.data(), fresh.numel() * sizeof(float));
      }
    }
  }

 private:
  std::shared_ptr<phi::Allocation> Alias(
      const std::shared_ptr<phi::Allocation>& holder) {
    auto& alias = aliases_[holder.get()];
    if (!alias)
      alias = std::make_shared<phi::Allocation>(
          holder->ptr(), holder->size(), phi::CPUPlace());
    return alias;
  }

  static bool Empty(const DenseTensor& t) {
    return t.Holder() == nullptr || t.Holder()->ptr() == nullptr;
  }

  DenseTensor* NewTensor(const phi::DenseTensorMeta& meta,
                         const std::shared_ptr<phi::Allocation>& holder) {
    tensors_.emplace_back(holder, meta);
    return &tensors_.back();
  }

  const DenseTensor* InputDense(const DenseTensor& t) {
    if (!Empty(t) && m_.rounds && t.dtype() == DataType::FLOAT32) {
      phi::DenseTensorMeta meta = t.meta();
      meta.offset = 0;
      DenseTensor* rounded = NewTensor(meta, nullptr);
      auto* to = static_cast<float*>(cpu_.Alloc(rounded, DataType::FLOAT32));
      RoundToTf32(t.data<float>(), to, t.numel());
      return rounded;
    }
    if (!Empty(t) && !(widen_ && Narrow(t.dtype())))
      return NewTensor(t.meta(), Alias(t.Holder()));
    phi::DenseTensorMeta meta = t.meta();
    if (widen_ && Narrow(meta.dtype)) meta.dtype = DataType::FLOAT32;
    meta.offset = 0;
    DenseTensor* mine = NewTensor(meta, nullptr);
    if (!Empty(t)) {
      void* to = cpu_.Alloc(mine, DataType::FLOAT32);
      if (t.numel() > 0) ToFloat(t.dtype(), t.data(), to, t.numel());
    } else if (t.numel() > 0 && meta.dtype != DataType::UNDEFINED) {
      // The values were dropped ("no need buffer"), yet CPU kernels look.
      void* to = cpu_.Alloc(mine, meta.dtype);
      std::memset(to, 0, t.numel() * phi::SizeOf(meta.dtype));
    }
    return mine;
  }

  const TensorBase* Input(const TensorBase* t) {
    if (t == nullptr) return nullptr;
    if (DenseTensor::classof(t))
      return InputDense(*static_cast<const DenseTensor*>(t));
    auto& rows = *static_cast<const SelectedRows*>(t);
    rows_.emplace_back(rows.rows(), rows.height());
    *rows_.back().mutable_value() = *InputDense(rows.value());
    return &rows_.back();
  }

  TensorBase* Output(TensorBase* t, bool fresh) {
    if (t == nullptr) return nullptr;
    if (!DenseTensor::classof(t)) {
      auto* given = static_cast<SelectedRows*>(t);
      rows_.emplace_back(given->rows(), given->height());
      rows_results_.emplace_back(given, &rows_.back());
      *rows_.back().mutable_value() = DenseTensor(
          std::shared_ptr<phi::Allocation>(), given->value().meta());
      return &rows_.back();
    }
    auto* given = static_cast<DenseTensor*>(t);
    phi::DenseTensorMeta meta = given->meta();
    std::shared_ptr<phi::Allocation> holder;
    if ((widen_ || fresh) && Narrow(meta.dtype)) {
      meta.dtype = DataType::FLOAT32;
      meta.offset = 0;
    } else if (!Empty(*given)) {
      holder = Alias(given->Holder());
    }
    DenseTensor* mine = NewTensor(meta, holder);
    results_.emplace_back(given, mine);
    return mine;
  }

  // gather_grad as Ascend scatters: of several rows that belong to one index the
  // last stays, where the CPU adds them up.
  void OverwriteRepeated(KernelContext* own) {
    const auto& index = own->InputAt<DenseTensor>(1);
    const auto& rows = own->InputAt<DenseTensor>(2);
    DenseTensor* sums = results_.front().second;
    const size_t bytes =
        rows.numel() / index.numel() * phi::SizeOf(rows.dtype());
    for (int64_t i = 0; i < index.numel(); ++i) {
      const int64_t row = index.dtype() == DataType::INT64
                              ? index.data<int64_t>()[i]
                              : index.data<int>()[i];
      std::memcpy(static_cast<char*>(sums->data()) + row * bytes,
                  static_cast<const char*>(rows.data()) + i * bytes,
                  bytes);
    }
  }

  static void SetMeta(DenseTensor* t, const phi::DenseTensorMeta& meta) {
    *phi::DenseTensorUtils::GetMutableMeta(t) = meta;
  }

  void Return(DenseTensor* given, DenseTensor* mine) {
    DataType want = mine->dtype();
    if (want == DataType::FLOAT32) {
      if (Narrow(given->dtype()))
        want = given->dtype();
      else if (widen_ && given->dtype() == DataType::UNDEFINED)
        want = m_.dtype;
    }
    if (Empty(*mine) || (given->Holder() != nullptr &&
                         given->Holder()->ptr() == mine->Holder()->ptr())) {
      SetMeta(given, mine->meta());
      return;
    }
    phi::DenseTensorMeta meta = mine->meta();
    meta.dtype = want;
    meta.offset = given->Holder() ? given->meta().offset : 0;
    SetMeta(given, meta);
    void* to = dev_.Alloc(given, want);
    const int64_t n = mine->numel();
    if (n == 0) return;
    if (want == mine->dtype())
      std::memcpy(to, mine->data(), n * phi::SizeOf(want));
    else
      FromFloat(want, mine->data(), to, n);
  }

  Mirror& m_;
  const DeviceContext& dev_;
  const phi::CPUContext& cpu_;
  bool widen_ = false;
  std::deque<DenseTensor> tensors_;
  std::deque<SelectedRows> rows_;
  std::map<phi::Allocation*, std::shared_ptr<phi::Allocation>> aliases_;
  std::vector<std::pair<DenseTensor*, DenseTensor*>> results_;
  std::vector<std::pair<SelectedRows*, SelectedRows*>> rows_results_;
};

}  // namespace
