// Messages between the processes that act as the NPU double's boards: what the collectives are built on.
//
// Each pair of ranks of a communicator has a stream socket with an abstract name: no file, no network.  Behind each
// socket a thread puts what arrives into queues, so that a sender never waits for its receiver, and sees at once when
// the other process ends.
#pragma once
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace ccl {

using Clock = std::chrono::steady_clock;

// How long a rank waits for another one, seconds.
inline Clock::time_point Deadline() {
  const char* text = std::getenv("NPU_DOUBLE_CCL_TIMEOUT_S");
  const double given = text == nullptr ? 0 : std::atof(text);
  return Clock::now() + std::chrono::milliseconds(static_cast<int64_t>((given > 0 ? given : 120) * 1000));
}

// What a rank is doing.  All ranks of a collective must do the same, and each tells the others.
struct Step {
  uint8_t kind, type, op;
  uint32_t root;
  uint64_t number, count;
};

struct Header {
  uint32_t magic;
  Step step;
  uint64_t bytes;
};
constexpr uint32_t kMagic = 0x4E505543;

struct Message {
  Step step;
  std::vector<char> data;
};

// Sends or receives exactly n bytes; false where the other side is gone.
inline bool SendAll(int fd, const void* data, size_t n) {
  for (auto* at = static_cast<const char*>(data); n > 0;) {
    const ssize_t done = ::send(fd, at, n, MSG_NOSIGNAL);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return false;
    at += done;
    n -= static_cast<size_t>(done);
  }
  return true;
}
inline bool ReceiveAll(int fd, void* data, size_t n) {
  for (auto* at = static_cast<char*>(data); n > 0;) {
    const ssize_t done = ::recv(fd, at, n, 0);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return false;
    at += done;
    n -= static_cast<size_t>(done);
  }
  return true;
}

enum class Queue { kCollective, kDirect };
enum class Got { kMessage, kGone, kLate };

// The way to one other rank.
class Link : public std::enable_shared_from_this<Link> {
 public:
  explicit Link(int fd) : fd_(fd) {}
  ~Link() { ::close(fd_); }

  // `direct` says which kind of message is a send from one rank to another.
  void Start(uint8_t direct) {
    std::thread([self = shared_from_this(), direct] { self->Listen(direct); }).detach();
  }
  // The thread ends and with it the socket.
  void Stop() { ::shutdown(fd_, SHUT_RDWR); }

  bool Send(const Step& step, const void* data, size_t bytes) {
    const Header header{kMagic, step, bytes};
    return SendAll(fd_, &header, sizeof header) && SendAll(fd_, data, bytes);
  }

  Got Receive(Queue from, Clock::time_point deadline, Message* out) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto& queue = queues_[static_cast<int>(from)];
    if (!arrived_.wait_until(lock, deadline, [&] { return gone_ || !queue.empty(); })) return Got::kLate;
    if (queue.empty()) return Got::kGone;
    *out = std::move(queue.front());
    queue.pop_front();
    return Got::kMessage;
  }

 private:
  void Listen(uint8_t direct) {
    Header header;
    while (ReceiveAll(fd_, &header, sizeof header) && header.magic == kMagic) {
      Message message{header.step, std::vector<char>(header.bytes)};
      if (!ReceiveAll(fd_, message.data.data(), header.bytes)) break;
      std::lock_guard<std::mutex> lock(mutex_);
      queues_[header.step.kind == direct ? 1 : 0].push_back(std::move(message));
      arrived_.notify_all();
    }
    std::lock_guard<std::mutex> lock(mutex_);
    gone_ = true;
    arrived_.notify_all();
  }

  const int fd_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<Message> queues_[2];  // by Queue
  bool gone_ = false;
};

// ---- how the ranks of a communicator find each other ----

// 128 random bits as text: nobody else takes these names.
inline std::string NewName() {
  unsigned char bits[16];
  for (size_t got = 0; got < sizeof bits;) {
    const ssize_t more = ::getrandom(bits + got, sizeof bits - got, 0);
    if (more > 0) got += static_cast<size_t>(more);
  }
  std::string text;
  for (unsigned char byte : bits) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

inline socklen_t Address(const std::string& name, size_t rank, sockaddr_un* out) {
  std::memset(out, 0, sizeof *out);
  out->sun_family = AF_UNIX;
  const std::string path = "npu-double-" + name + "-" + std::to_string(rank);
  std::memcpy(out->sun_path + 1, path.data(), path.size());  // a zero first: the name is no file
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
}

inline bool OfThisUser(int fd) {
  ucred who{};
  socklen_t size = sizeof who;
  return ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) == 0 && who.uid == ::getuid();
}

// A socket to a rank that listens already or soon; -1 where it does not come.
inline int Connect(const std::string& name, size_t to, uint32_t own, Clock::time_point deadline) {
  sockaddr_un address;
  const socklen_t size = Address(name, to, &address);
  while (Clock::now() < deadline) {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    if (::connect(fd, reinterpret_cast<sockaddr*>(&address), size) == 0 && OfThisUser(fd) &&
        SendAll(fd, &own, sizeof own))
      return fd;
    ::close(fd);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return -1;
}

// A socket from any of the higher ranks, whose number comes in `from`; -1 where none comes.
inline int Accept(int listening, Clock::time_point deadline, uint32_t* from) {
  pollfd waiting{listening, POLLIN, 0};
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
  if (left.count() <= 0 || ::poll(&waiting, 1, static_cast<int>(left.count())) <= 0) return -1;
  const int fd = ::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
  if (fd >= 0 && OfThisUser(fd) && ReceiveAll(fd, from, sizeof *from)) return fd;
  if (fd >= 0) ::close(fd);
  return -1;
}

// One link per rank, none to itself; empty where somebody does not come.
inline std::vector<std::shared_ptr<Link>> Meet(const std::string& name, size_t ranks, size_t rank, uint8_t direct) {
  std::vector<std::shared_ptr<Link>> links(ranks);
  const auto deadline = Deadline();
  const int listening = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address;
  const socklen_t size = Address(name, rank, &address);
  bool met = listening >= 0 && ::bind(listening, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
             ::listen(listening, static_cast<int>(ranks)) == 0;
  for (size_t lower = 0; met && lower < rank; ++lower) {
    const int fd = Connect(name, lower, static_cast<uint32_t>(rank), deadline);
    met = fd >= 0;
    if (met) links[lower] = std::make_shared<Link>(fd);
  }
  for (size_t higher = rank + 1; met && higher < ranks; ++higher) {
    uint32_t from = 0;
    const int fd = Accept(listening, deadline, &from);
    met = fd >= 0 && from > rank && from < ranks && !links[from];
    if (met) links[from] = std::make_shared<Link>(fd);
  }
  if (listening >= 0) ::close(listening);
  if (!met) return {};
  for (auto& link : links)
    if (link) link->Start(direct);
  return links;
}

}  // namespace ccl
