#include "tools/run/output.hpp"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <climits>
#include <string>
#include <string_view>
#include <utility>

namespace dualpipe::run {
namespace {

using namespace std::chrono_literals;

/// The target may be a file, and others may share it, so it is neither given to an event loop nor made non-blocking, but
/// looked at again and again.
constexpr auto kPause = 5ms;

/// How much to write at once: what a pipe that is writable takes without waiting, and of it whole lines, as other
/// programs may write in between.
std::size_t size_of_next(std::string_view text) {
  if (text.size() <= PIPE_BUF) return text.size();
  const std::size_t newline = text.substr(0, PIPE_BUF).rfind('\n');
  return newline == std::string_view::npos ? PIPE_BUF : newline + 1;
}

bool is_writable(int target) {
  pollfd waited{.fd = target, .events = POLLOUT, .revents = 0};
  return ::poll(&waited, 1, 0) != 0;  // where it fails, writing tells why
}

/// A terminal that is writable may take less than a line, and then blocks until it is not paused any more.
int open_terminal(int target) {
  if (!::isatty(target)) return -1;
  return ::open(("/proc/self/fd/" + std::to_string(target)).c_str(), O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

}  // namespace

Output::Output(asio::io_context& io, int target)
    : terminal_(open_terminal(target)), target_(terminal_.get() >= 0 ? terminal_.get() : target), retry_(io) {}

void Output::write(std::string text, Handler handler) {
  queue_.push_back({std::move(text), 0, std::move(handler)});
  if (queue_.size() == 1) write_more();
}

/// @return 0, or errno: EAGAIN and EINTR where it has to wait.
int Output::write_some(Item& item) const {
  while (item.written < item.text.size()) {
    if (!is_writable(target_)) return EAGAIN;
    const auto rest = std::string_view(item.text).substr(item.written);
    const ssize_t written = ::write(target_, rest.data(), size_of_next(rest));
    if (written < 0) return errno;
    item.written += written;
  }
  return 0;
}

void Output::write_more() {
  while (!queue_.empty()) {
    const int error = write_some(queue_.front());
    if (error == EAGAIN || error == EINTR) {
      retry_.expires_after(kPause);
      retry_.async_wait([this](const asio::error_code& ended) {
        if (!ended) write_more();
      });
      return;
    }
    const Handler handler = std::move(queue_.front().handler);
    queue_.pop_front();
    handler(error);
  }
}

}  // namespace dualpipe::run
