// Collectives of the NPU double: the xccl_* half of PaddlePaddle's CustomDevice C ABI, between processes of one machine
// that each hold one board.
//
// In a collective every rank sends every other one a message, with what it is doing and the part that the other
// needs.  So a rank that does something else, or has ended, is an error on all ranks that says what each does, not a
// hang or a wrong number.  Parts are combined in the order of the ranks: the same bits on every rank and in every run.
// Half precision is summed in float32 and rounded once.
//
// As the real plugin it carries no bool, no int16, no unsigned or complex types, and has no all_to_all.
// Source: PaddleCustomDevice backends/npu/runtime/runtime.cc, `PDDataTypeToHcclDataType`; bfloat16, which that revision
// of 2023 lacks, is carried, because PaddleMIX's recipes for the board train in it.
//
// What it does not prove: speed, work in the background (everything is done when a call returns), sends that wait for
// their receiver, several machines.
//
// Environment: NPU_DOUBLE_CCL_TIMEOUT_S (120), how long a rank waits for another.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <map>

#include "ccl_links.h"
#include "paddle/phi/backends/device_ext.h"
#include "paddle/phi/common/bfloat16.h"
#include "paddle/phi/common/float16.h"

namespace {

using ccl::Got;
using ccl::Link;
using ccl::Message;
using ccl::Queue;
using ccl::Step;

enum Kind : uint8_t { kAllReduce, kReduce, kBroadcast, kAllGather, kReduceScatter, kDirect };
const char* const kKinds[] = {"all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "send"};
const char* const kOps[] = {"sum", "avg", "max", "min", "prod"};

struct Type {
  const char* name;
  size_t size;
};
const std::map<int, Type> kTypes = {
    {UINT8, {"uint8", 1}},     {INT8, {"int8", 1}},       {INT32, {"int32", 4}},     {INT64, {"int64", 8}},
    {FLOAT16, {"float16", 2}}, {BFLOAT16, {"bfloat16", 2}}, {FLOAT32, {"float32", 4}}, {FLOAT64, {"float64", 8}},
};

bool Reduces(uint8_t kind) { return kind == kAllReduce || kind == kReduce || kind == kReduceScatter; }

std::string Words(const Step& step) {
  std::string text = std::string(kKinds[step.kind]) + " #" + std::to_string(step.number) + " (";
  if (Reduces(step.kind)) text += std::string(kOps[step.op]) + ", ";
  text += std::to_string(step.count) + " x " + kTypes.at(step.type).name;
  if (step.kind == kBroadcast || step.kind == kReduce) text += ", root " + std::to_string(step.root);
  return text + ")";
}

// ---- what ran ----
std::mutex ran_mutex;
std::map<std::string, std::pair<size_t, size_t>> ran;  // name:type -> calls, bytes given

void Note(const Step& step) {
  std::lock_guard<std::mutex> lock(ran_mutex);
  auto& entry = ran[std::string(kKinds[step.kind]) + ":" + kTypes.at(step.type).name];
  entry.first += 1;
  entry.second += step.count * kTypes.at(step.type).size;
}

// ---- parts of all ranks into one ----
template <typename T, typename Wide>
void Combine(C_CCLReduceOp op, const std::vector<const void*>& parts, size_t count, void* out) {
  std::vector<Wide> total(count);
  for (size_t rank = 0; rank < parts.size(); ++rank) {
    auto* part = static_cast<const T*>(parts[rank]);
    for (size_t i = 0; i < count; ++i) {
      const Wide value = static_cast<Wide>(part[i]);
      Wide& so_far = total[i];
      if (rank == 0) so_far = value;
      else if (op == SUM || op == AVG) so_far = so_far + value;
      else if (op == PRODUCT) so_far = so_far * value;
      else if (op == MAX) so_far = value > so_far || value != value ? value : so_far;  // NaN stays
      else so_far = value < so_far || value != value ? value : so_far;
    }
  }
  auto* result = static_cast<T*>(out);
  const Wide shares = static_cast<Wide>(op == AVG ? parts.size() : 1);
  for (size_t i = 0; i < count; ++i) result[i] = static_cast<T>(total[i] / shares);
}

void CombineAs(int type, C_CCLReduceOp op, const std::vector<const void*>& parts, size_t count, void* out) {
  switch (type) {
    case UINT8: return Combine<uint8_t, uint8_t>(op, parts, count, out);
    case INT8: return Combine<int8_t, int8_t>(op, parts, count, out);
    case INT32: return Combine<int32_t, int32_t>(op, parts, count, out);
    case INT64: return Combine<int64_t, int64_t>(op, parts, count, out);
    case FLOAT16: return Combine<phi::dtype::float16, float>(op, parts, count, out);
    case BFLOAT16: return Combine<phi::dtype::bfloat16, float>(op, parts, count, out);
    case FLOAT32: return Combine<float, float>(op, parts, count, out);
    default: return Combine<double, double>(op, parts, count, out);
  }
}

}  // namespace

// ---- one communicator ----
struct C_CCLComm_st {
  std::string name;
  size_t rank;
  std::vector<std::shared_ptr<Link>> links;  // by rank, none to itself
  uint64_t done = 0;                         // collectives
  bool broken = false;                       // after an error the ranks are no longer at the same place
  std::mutex mutex;                          // one thing at a time

  size_t ranks() const { return links.size(); }

  C_Status Fail(const Step& step, const std::string& why) {
    broken = true;
    std::fprintf(stderr, "npu double, rank %zu of %zu: %s, but %s\n", rank, ranks(), Words(step).c_str(), why.c_str());
    return C_ERROR;
  }

  bool Receive(const Step& step, size_t from, Queue queue, Message* out, C_Status* status) {
    const Got got = links[from]->Receive(queue, ccl::Deadline(), out);
    const std::string who = "rank " + std::to_string(from);
    if (got == Got::kMessage) return true;
    *status = Fail(step, who + (got == Got::kGone ? " is gone" : " did not come in time"));
    return false;
  }

  // Exchanges parts: `part(r)` is where rank r's part begins, null for an empty one, `bytes` its size.  What the others
  // have for this rank comes to `use`, by rank and with null for an empty one, this rank's own among them.
  C_Status Exchange(Step step,
                    size_t bytes,
                    const std::function<const void*(size_t)>& part,
                    const std::function<void(const std::vector<const void*>&)>& use) {
    if (kTypes.count(step.type) == 0) return Unknown(step);
    std::lock_guard<std::mutex> lock(mutex);
    step.number = ++done;
    Note(step);
    if (broken) return Fail(step, "an earlier call on this communicator failed");
    for (size_t to = 0; to < ranks(); ++to)
      if (links[to]) links[to]->Send(step, part(to), part(to) == nullptr ? 0 : bytes);  // a receive tells if it is gone
    std::vector<Message> messages(ranks());
    std::vector<const void*> parts(ranks());
    for (size_t from = 0; from < ranks(); ++from) {
      C_Status status = C_SUCCESS;
      if (!links[from]) continue;
      if (!Receive(step, from, Queue::kCollective, &messages[from], &status)) return status;
      const Step& other = messages[from].step;
      if (std::memcmp(&other, &step, sizeof step) != 0)
        return Fail(step, "rank " + std::to_string(from) + " is at " + Words(other));
      parts[from] = messages[from].data.empty() ? nullptr : messages[from].data.data();
    }
    parts[rank] = part(rank);
    use(parts);
    return C_SUCCESS;
  }

  C_Status Unknown(const Step& step) {
    broken = true;
    std::fprintf(stderr, "npu double, rank %zu of %zu: %s of C_DataType %d, which the boards do not carry\n", rank,
                 ranks(), kKinds[step.kind], step.type);
    return C_ERROR;
  }
};

namespace {

Step StepOf(Kind kind, C_DataType type, size_t count, C_CCLReduceOp op = SUM, size_t root = 0) {
  Step step;
  std::memset(&step, 0, sizeof step);  // compared as bytes
  step.kind = kind;
  step.type = static_cast<uint8_t>(type);
  step.op = static_cast<uint8_t>(op);
  step.root = static_cast<uint32_t>(root);
  step.count = count;
  return step;
}
size_t Bytes(C_DataType type, size_t count) {
  const auto found = kTypes.find(type);
  return found == kTypes.end() ? 0 : found->second.size * count;
}
const char* At(const void* data, size_t offset) { return static_cast<const char*>(data) + offset; }

C_Status AllReduce(
    void* in, void* out, size_t count, C_DataType type, C_CCLReduceOp op, C_CCLComm comm, C_Stream) {
  return comm->Exchange(
      StepOf(kAllReduce, type, count, op), Bytes(type, count), [&](size_t) { return in; },
      [&](auto& parts) { CombineAs(type, op, parts, count, out); });
}
C_Status Reduce(void* in,
                void* out,
                size_t count,
                C_DataType type,
                C_CCLReduceOp op,
                size_t root,
                C_CCLComm comm,
                C_Stream) {
  return comm->Exchange(
      StepOf(kReduce, type, count, op, root), Bytes(type, count),
      [&](size_t to) { return to == root ? in : nullptr; },
      [&](auto& parts) {
        if (comm->rank == root) CombineAs(type, op, parts, count, out);
      });
}
C_Status Broadcast(void* data, size_t count, C_DataType type, size_t root, C_CCLComm comm, C_Stream) {
  return comm->Exchange(
      StepOf(kBroadcast, type, count, SUM, root), Bytes(type, count),
      [&](size_t) { return comm->rank == root ? data : nullptr; },
      [&](auto& parts) { std::memmove(data, parts[root], Bytes(type, count)); });
}
C_Status AllGather(void* in, void* out, size_t count, C_DataType type, C_CCLComm comm, C_Stream) {
  const size_t bytes = Bytes(type, count);
  return comm->Exchange(
      StepOf(kAllGather, type, count), bytes, [&](size_t) { return in; },
      [&](auto& parts) {
        std::memmove(static_cast<char*>(out) + comm->rank * bytes, in, bytes);  // first: it may lie in `out`
        for (size_t from = 0; from < parts.size(); ++from)
          if (from != comm->rank) std::memcpy(static_cast<char*>(out) + from * bytes, parts[from], bytes);
      });
}
C_Status ReduceScatter(
    void* in, void* out, size_t count, C_DataType type, C_CCLReduceOp op, C_CCLComm comm, C_Stream) {
  const size_t bytes = Bytes(type, count);  // of one rank's share
  return comm->Exchange(
      StepOf(kReduceScatter, type, count, op), bytes, [&](size_t to) { return At(in, to * bytes); },
      [&](auto& parts) { CombineAs(type, op, parts, count, out); });
}

// ---- from one rank to another: receives between group_start and group_end wait for its end ----
thread_local int depth = 0;
thread_local std::vector<std::function<C_Status()>> waiting;

C_Status Send(void* data, size_t count, C_DataType type, size_t to, C_CCLComm comm, C_Stream) {
  const Step step = StepOf(kDirect, type, count, SUM, to);
  if (kTypes.count(type) == 0) return comm->Unknown(step);
  Note(step);
  if (to < comm->ranks() && comm->links[to] && comm->links[to]->Send(step, data, Bytes(type, count))) return C_SUCCESS;
  return comm->Fail(step, "rank " + std::to_string(to) + " is gone");
}
C_Status ReceiveNow(void* data, size_t count, C_DataType type, size_t from, C_CCLComm comm) {
  const Step step = StepOf(kDirect, type, count, SUM, comm->rank);
  Message message;
  C_Status status = C_SUCCESS;
  if (!comm->Receive(step, from, Queue::kDirect, &message, &status)) return status;
  if (std::memcmp(&message.step, &step, sizeof step) != 0)
    return comm->Fail(step, "rank " + std::to_string(from) + " has sent " + Words(message.step));
  std::memcpy(data, message.data.data(), message.data.size());
  return C_SUCCESS;
}
C_Status Recv(void* data, size_t count, C_DataType type, size_t from, C_CCLComm comm, C_Stream) {
  if (kTypes.count(type) == 0) return comm->Unknown(StepOf(kDirect, type, count));
  if (depth == 0) return ReceiveNow(data, count, type, from, comm);
  waiting.push_back([=] { return ReceiveNow(data, count, type, from, comm); });
  return C_SUCCESS;
}
C_Status GroupStart() {
  ++depth;
  return C_SUCCESS;
}
C_Status GroupEnd() {
  if (--depth > 0) return C_SUCCESS;
  C_Status status = C_SUCCESS;
  for (auto& receive : waiting)
    if (status == C_SUCCESS) status = receive();
  waiting.clear();
  return status;
}

// ---- communicators ----
constexpr size_t kNameSize = 32;

C_Status NameSize(size_t* size) {
  *size = kNameSize;
  return C_SUCCESS;
}
C_Status NewId(C_CCLRootId* id) {
  if (id->sz != kNameSize) return C_ERROR;
  std::memcpy(id->data, ccl::NewName().data(), kNameSize);
  return C_SUCCESS;
}
C_Status Join(size_t ranks, C_CCLRootId* id, size_t rank, C_CCLComm* comm) {
  const std::string name(static_cast<const char*>(id->data), kNameSize);
  auto links = ccl::Meet(name, ranks, rank, kDirect);
  if (links.empty()) {
    std::fprintf(stderr, "npu double, rank %zu of %zu: not every rank has joined in time\n", rank, ranks);
    return C_ERROR;
  }
  *comm = new C_CCLComm_st{name, rank, std::move(links)};
  return C_SUCCESS;
}
C_Status Part(C_CCLComm comm) {
  for (auto& link : comm->links)
    if (link) link->Stop();
  delete comm;
  return C_SUCCESS;
}
C_Status NameOf(C_CCLComm comm, char* out) {
  std::strcpy(out, comm->name.c_str());
  return C_SUCCESS;
}

// Absent from the interface of paddle 3.0.0.
template <typename Api>
auto AddName(Api* api, int) -> decltype(api->xccl_get_comm_name, void()) {
  api->xccl_get_comm_name = NameOf;
}
template <typename Api>
void AddName(Api*, ...) {
  static_cast<void>(NameOf);
}

}  // namespace

// What ran since the last call, "all_reduce:float32=2/96" for two calls over 96 bytes, joined by commas; all_gather and
// reduce_scatter count one rank's part.
extern "C" const char* npu_double_ccl_ran() {
  static std::string text;
  std::lock_guard<std::mutex> lock(ran_mutex);
  text.clear();
  for (auto& [name, entry] : ran)
    text += (text.empty() ? "" : ",") + name + "=" + std::to_string(entry.first) + "/" + std::to_string(entry.second);
  ran.clear();
  return text.c_str();
}

void RegisterCollectives(C_DeviceInterface* api) {
  AddName(api, 0);
  api->xccl_get_unique_id_size = NameSize;
  api->xccl_get_unique_id = NewId;
  api->xccl_comm_init_rank = Join;
  api->xccl_destroy_comm = Part;
  api->xccl_all_reduce = AllReduce;
  api->xccl_broadcast = Broadcast;
  api->xccl_reduce = Reduce;
  api->xccl_all_gather = AllGather;
  api->xccl_reduce_scatter = ReduceScatter;
  api->xccl_group_start = GroupStart;
  api->xccl_group_end = GroupEnd;
  api->xccl_send = Send;
  api->xccl_recv = Recv;
}
