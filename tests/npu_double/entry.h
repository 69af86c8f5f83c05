// How dygraph enters a mirrored kernel of the NPU double.
//
// Static graphs hand a kernel a KernelContext.  Dygraph instead calls it by its
// C++ signature (the "variadic" pointer); that call is turned into a
// KernelContext here, from the argument kinds in KernelArgsDef and the System V
// x86-64 calling convention: everything but float and double is one word.
// It leans on paddle's internals and may need care when paddle is upgraded.
#pragma once

#include "mirror.h"

namespace {

// Reads the arguments of a call in the order of the kernel's signature.
class Reader {
 public:
  Reader(const uintptr_t* words, const uintptr_t* reals, const uintptr_t* stack)
      : words_(words), reals_(reals), stack_(stack) {}
  uintptr_t Word() { return w_ < 5 ? words_[w_++] : *stack_++; }
  template <typename T>
  T Real() {  // float or double: the low bytes of its slot
    const uintptr_t* at = r_ < 8 ? &reals_[r_++] : stack_++;
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  template <typename T>
  const T& Ref() {
    return *reinterpret_cast<const T*>(Word());
  }

 private:
  const uintptr_t *words_, *reals_, *stack_;
  int w_ = 0, r_ = 0;
};

}  // namespace

// Called by the stubs: the words are rsi, rdx, rcx, r8 and r9; the reals are
// xmm0 to xmm7; the stack holds what did not fit.
extern "C" __attribute__((visibility("hidden"))) void npu_double_dispatch(
    size_t slot,
    const DeviceContext* dev,
    const uintptr_t* words,
    const uintptr_t* reals,
    const uintptr_t* stack) {
  Mirror& m = Mirrors()[slot];
  Reader in(words, reals, stack);
  KernelContext ctx(const_cast<DeviceContext*>(dev));
  for (Arg a : m.inputs) {
    switch (a) {
      case Arg::kDense:
        ctx.EmplaceBackInput(reinterpret_cast<const DenseTensor*>(in.Word()));
        break;
      case Arg::kRows:
        ctx.EmplaceBackInput(reinterpret_cast<const SelectedRows*>(in.Word()));
        break;
      case Arg::kOptional: {
        auto& t = in.Ref<paddle::optional<DenseTensor>>();
        ctx.EmplaceBackInput(t ? &*t : nullptr);
        break;
      }
      case Arg::kOptionalList: {
        auto& t = in.Ref<paddle::optional<std::vector<const DenseTensor*>>>();
        paddle::small_vector<const TensorBase*> list;
        if (t) {
          for (auto* x : *t) list.push_back(x);
        } else {
          list.push_back(nullptr);
        }
        ctx.EmplaceBackInputs(list);
        break;
      }
      default: {
        paddle::small_vector<const TensorBase*> list;
        for (auto* x : in.Ref<std::vector<const DenseTensor*>>())
          list.push_back(x);
        ctx.EmplaceBackInputs(list);
      }
    }
  }
  for (AttributeType a : m.attrs) {
    switch (a) {
      case AttributeType::BOOL:
        ctx.EmplaceBackAttr((in.Word() & 0xFF) != 0);
        break;
      case AttributeType::INT32:
        ctx.EmplaceBackAttr(static_cast<int>(in.Word()));
        break;
      case AttributeType::INT64:
        ctx.EmplaceBackAttr(static_cast<int64_t>(in.Word()));
        break;
      case AttributeType::FLOAT32:
        ctx.EmplaceBackAttr(in.Real<float>());
        break;
      case AttributeType::FLOAT64:
        ctx.EmplaceBackAttr(in.Real<double>());
        break;
      case AttributeType::STRING:
        ctx.EmplaceBackAttr(in.Ref<std::string>());
        break;
      case AttributeType::BOOLS:
        ctx.EmplaceBackAttr(in.Ref<std::vector<bool>>());
        break;
      case AttributeType::INT32S:
        ctx.EmplaceBackAttr(in.Ref<std::vector<int>>());
        break;
      case AttributeType::INT64S:
        ctx.EmplaceBackAttr(in.Ref<std::vector<int64_t>>());
        break;
      case AttributeType::FLOAT32S:
        ctx.EmplaceBackAttr(in.Ref<std::vector<float>>());
        break;
      case AttributeType::FLOAT64S:
        ctx.EmplaceBackAttr(in.Ref<std::vector<double>>());
        break;
      case AttributeType::STRINGS:
        ctx.EmplaceBackAttr(in.Ref<std::vector<std::string>>());
        break;
      case AttributeType::SCALAR:
        ctx.EmplaceBackAttr(in.Ref<phi::Scalar>());
        break;
      case AttributeType::SCALARS:
        ctx.EmplaceBackAttr(in.Ref<std::vector<phi::Scalar>>());
        break;
      case AttributeType::INT_ARRAY:
        ctx.EmplaceBackAttr(in.Ref<phi::IntArray>());
        break;
      case AttributeType::DATA_TYPE:
        ctx.EmplaceBackAttr(static_cast<DataType>(in.Word() & 0xFFFFFFFF));
        break;
      case AttributeType::DATA_LAYOUT:
        ctx.EmplaceBackAttr(
            static_cast<phi::DataLayout>(in.Word() & 0xFFFFFFFF));
        break;
      default:
        ctx.EmplaceBackAttr(in.Ref<phi::Place>());
    }
  }
  for (Arg a : m.outputs) {
    if (a == Arg::kList) {  // a vector passed by value: by hidden reference
      paddle::small_vector<TensorBase*> list;
      for (auto* x : in.Ref<std::vector<DenseTensor*>>()) list.push_back(x);
      ctx.EmplaceBackOutputs(list);
    } else if (a == Arg::kRows) {
      ctx.EmplaceBackOutput(reinterpret_cast<SelectedRows*>(in.Word()));
    } else {
      ctx.EmplaceBackOutput(reinterpret_cast<DenseTensor*>(in.Word()));
    }
  }
  Call(&m, *dev).Run(&ctx);
}

// The variadic pointer carries no closure, so each slot needs code of its own:
// a 16-byte stub that loads its number and jumps.  The shared tail spills the
// argument registers and is unwindable, since kernels throw.
asm(R"(
  .text
  .p2align 4
npu_double_stubs:
  .set slot, 0
  .rept 8192
  .p2align 4
  movl $slot, %eax
  jmp npu_double_spill
  .set slot, slot+1
  .endr
  .type npu_double_spill, @function
npu_double_spill:
  .cfi_startproc
  pushq %rbp
  .cfi_def_cfa_offset 16
  .cfi_offset %rbp, -16
  movq %rsp, %rbp
  .cfi_def_cfa_register %rbp
  subq $112, %rsp
  movq %rsi, 0(%rsp)
  movq %rdx, 8(%rsp)
  movq %rcx, 16(%rsp)
  movq %r8, 24(%rsp)
  movq %r9, 32(%rsp)
  movsd %xmm0, 40(%rsp)
  movsd %xmm1, 48(%rsp)
  movsd %xmm2, 56(%rsp)
  movsd %xmm3, 64(%rsp)
  movsd %xmm4, 72(%rsp)
  movsd %xmm5, 80(%rsp)
  movsd %xmm6, 88(%rsp)
  movsd %xmm7, 96(%rsp)
  movq %rdi, %rsi
  movl %eax, %edi
  movq %rsp, %rdx
  leaq 40(%rsp), %rcx
  leaq 16(%rbp), %r8
  call npu_double_dispatch
  leave
  .cfi_def_cfa %rsp, 8
  ret
  .cfi_endproc
  .size npu_double_spill, .-npu_double_spill
)");
extern "C" const char npu_double_stubs[]
    __attribute__((visibility("hidden")));
