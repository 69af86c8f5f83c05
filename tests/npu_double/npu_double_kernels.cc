// Registers the kernels of the NPU double: every dense CPU kernel of the
// installed PaddlePaddle, offered again under backend "npu".
//
// What runs is the CPU's arithmetic.  That a kernel is here proves nothing of a
// real board: its plugin has fewer kernels, and others in low precision.
// Collectives and sparse tensors are left out.
//
// With NPU_DOUBLE_STRICT, a list of files joined by colons, only the operators
// and types that those name are offered: a line is a name and its types.  What
// is missing then goes to the CPU, as it does with the plugin that the list was
// read from.  gather_grad then overwrites instead of adding up, as that one's.
//
// With NPU_DOUBLE_TF32=1 the operands of float32 products lose all but 10 bits
// of their fractions, as in TF32 on a GPU and HF32 on an NPU.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "entry.h"

namespace {

// Left to the framework: transfers, input/output and collectives.
bool Skipped(const std::string& name) {
  static const std::set<std::string> names = {
      "all_gather", "all_reduce", "all_to_all", "broadcast", "coalesce_tensor",
      "dist_concat", "feed", "fetch", "global_gather", "global_scatter",
      "load", "load_combine", "memcpy", "memcpy_d2h", "memcpy_h2d", "p_recv",
      "p_send", "print_kernel", "reduce", "reduce_scatter", "save",
      "save_combine", "shadow_feed", "shadow_output", "share_data"};
  return names.count(name) > 0 || name.rfind("c_", 0) == 0;
}

using ByType = std::map<DataType, const phi::Kernel*>;
using Listed = std::map<std::string, std::set<std::string>>;

// Operator -> types, of the files that NPU_DOUBLE_STRICT names.
Listed ReadListed() {
  Listed listed;
  const char* paths = std::getenv("NPU_DOUBLE_STRICT");
  std::istringstream names(paths == nullptr ? "" : paths);
  for (std::string path; std::getline(names, path, ':');) {
    std::ifstream file(path);
    if (!file) {
      std::fprintf(stderr, "npu double: cannot read %s\n", path.c_str());
      std::abort();
    }
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string name;
      if (!(words >> name) || name[0] == '#') continue;
      for (std::string type; words >> type;) listed[name].insert(type);
    }
  }
  return listed;
}

// Whether an operator is offered in a type: all are, where nothing is listed.
bool Offered(const Listed& listed, const std::string& name, DataType type) {
  if (listed.empty()) return true;
  auto found = listed.find(name);
  return found != listed.end() &&
         found->second.count(phi::DataTypeToString(type)) > 0;
}

// What the CPU has of an operator.
ByType CpuKernels(const phi::KernelKeyMap& kernels) {
  ByType found;
  for (auto& one : kernels)
    if (one.first.backend() == Backend::CPU &&
        one.first.layout() == phi::DataLayout::ALL_LAYOUT)
      found[one.first.dtype()] = &one.second;
  return found;
}

// (type, whether the float32 kernel serves it) of each mirror to make.
std::vector<std::pair<DataType, bool>> Wanted(const std::string& name,
                                              const ByType& cpu) {
  std::vector<std::pair<DataType, bool>> wanted;
  for (auto& one : cpu)
    if (!(Narrow(one.first) && MasterInput(name) >= 0))
      wanted.emplace_back(one.first, false);
  if (cpu.count(DataType::FLOAT32) && !FloatOnly(name))
    for (DataType low : {DataType::FLOAT16, DataType::BFLOAT16})
      if (!cpu.count(low) || MasterInput(name) >= 0)
        wanted.emplace_back(low, true);
  return wanted;
}

// False where the signature has an argument that cannot be passed on.
bool Describe(const phi::Kernel& base, Mirror* m) {
  m->cpu = base;
  bool known = base.IsValid();
  for (auto& in : base.args_def().input_defs())
    m->inputs.push_back(Classify(in.type_index));
  for (auto& out : base.args_def().output_defs())
    m->outputs.push_back(Classify(out.type_index));
  for (auto& attr : base.args_def().attribute_defs())
    m->attrs.push_back(attr.type_index);
  for (Arg a : m->inputs) known = known && a != Arg::kUnknown;
  for (Arg a : m->outputs) known = known && a != Arg::kUnknown;
  return known;
}

// The kernel that paddle sees: the same signature, on the device.
phi::Kernel Offer(size_t slot, const phi::Kernel& base, Backend npu) {
  const Mirror& m = Mirrors()[slot];
  phi::Kernel kernel(
      [slot](KernelContext* ctx) {
        Call(&Mirrors()[slot], ctx->GetDeviceContext<DeviceContext>()).Run(ctx);
      },
      const_cast<char*>(npu_double_stubs + 16 * slot));
  *kernel.mutable_args_def() = base.args_def();
  auto move = [&m, npu](phi::TensorArgDef* def) {
    if (def->backend == Backend::CPU) def->backend = npu;
    if (m.widen && def->dtype == DataType::FLOAT32) def->dtype = m.dtype;
  };
  for (auto& in : kernel.mutable_args_def()->input_defs()) move(&in);
  for (auto& out : kernel.mutable_args_def()->output_defs()) move(&out);
  return kernel;
}

}  // namespace

// Names of the kernels that ran since the last call, each once: "a,b,c".
extern "C" const char* npu_double_kernels_ran() {
  static std::string text;
  std::set<std::string> names;
  for (auto& m : Mirrors()) {
    if (m.calls > 0) names.insert(m.name + (m.widen ? "*" : ""));
    m.calls = 0;
  }
  text.clear();
  for (auto& name : names) text += (text.empty() ? "" : ",") + name;
  return text.c_str();
}

namespace {

// Calls of the fused operators, by name.
std::map<std::string, size_t>& FusedCalls() {
  static auto* calls = new std::map<std::string, size_t>();
  return *calls;
}

}  // namespace

void CountFused(const char* name) { ++FusedCalls()[name]; }

// Calls since the process began: "a=3,b=1", a fused operator as one.
extern "C" const char* npu_double_calls() {
  static std::string text;
  std::map<std::string, size_t> calls = FusedCalls();
  for (auto& m : Mirrors())
    if (m.total > 0) calls[m.name] += m.total;
  text.clear();
  for (auto& one : calls)
    text += (text.empty() ? "" : ",") + one.first + "=" + std::to_string(one.second);
  return text.c_str();
}

void RegisterMirrors(const char* device_type) {
  const Backend npu = paddle::experimental::StringToBackend(device_type);
  auto& mirrors = Mirrors();
  const Listed listed = ReadListed();
  const char* asked = std::getenv("NPU_DOUBLE_TF32");
  const bool rounds = asked != nullptr && std::string(asked) == "1";
  mirrors.reserve(kSlots);  // the stubs hold numbers, kernels hold references
  for (auto& by_name : phi::KernelFactory::Instance().kernels()) {
    const std::string& name = by_name.first;
    if (Skipped(name)) continue;
    const ByType cpu = CpuKernels(by_name.second);
    std::vector<std::pair<KernelKey, phi::Kernel>> added;
    for (auto& one : Wanted(name, cpu)) {
      if (!Offered(listed, name, one.first)) continue;
      const phi::Kernel& base =
          *cpu.at(one.second ? DataType::FLOAT32 : one.first);
      Mirror m;
      m.name = name;
      m.dtype = one.first;
      m.widen = one.second;
      m.overwrites = !listed.empty() && name == "gather_grad";
      m.rounds = rounds && one.first == DataType::FLOAT32 && IsProduct(name);
      if (!Describe(base, &m)) continue;
      if (mirrors.size() == kSlots) {
        std::fprintf(stderr, "npu double: more than %zu kernels\n", kSlots);
        std::abort();
      }
      mirrors.push_back(std::move(m));
      added.emplace_back(KernelKey(npu, phi::DataLayout::ALL_LAYOUT, one.first),
                         Offer(mirrors.size() - 1, base, npu));
    }
    for (auto& one : added) by_name.second.emplace(one.first, one.second);
  }
}
