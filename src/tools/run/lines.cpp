#include "tools/run/lines.hpp"

namespace dualpipe::run {
namespace {

/// A program that never ends its line must not fill the launcher's memory.
constexpr std::size_t kLongestLine = 1 << 20;
constexpr std::chrono::seconds kProgressInterval{1};
/// Each line on a terminal clears its row first: another stream's progress may stand there.
constexpr std::string_view kClearRow = "\033[K";
/// The cursor cannot come back over a line that was wrapped.
constexpr std::string_view kDoNotWrap = "\033[?7l", kWrap = "\033[?7h";

/// What a terminal would still show of a line with carriage returns in it.
std::string_view visible(std::string_view line) {
  while (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  const std::size_t overwritten = line.rfind('\r');
  return overwritten == std::string_view::npos ? line : line.substr(overwritten + 1);
}

}  // namespace

void LineLabeller::append(std::string_view line, std::string& out) const {
  if (terminal_) out += kClearRow;
  out += label_;
  out += visible(line);
  out += '\n';
}

void LineLabeller::show_progress(Clock::time_point now, std::string& out) {
  const std::size_t end = partial_.rfind('\r');
  if (end == std::string::npos) return;
  const std::string_view overwritten = visible(std::string_view(partial_).substr(0, end));
  if (terminal_) {
    if (!overwritten.empty()) {
      for (const std::string_view part : {kClearRow, kDoNotWrap, std::string_view(label_), overwritten, kWrap})
        out += part;
      out += '\r';
    }
    partial_.erase(0, overwritten.data() - partial_.data());  // a newline may end it yet
  } else if (last_progress_ == Clock::time_point::min() || now - last_progress_ >= kProgressInterval) {
    if (!overwritten.empty()) {
      append(overwritten, out);
      last_progress_ = now;
    }
    swallow_newline_ = end + 1 == partial_.size();
    partial_.erase(0, end + 1);
  } else {
    partial_.erase(0, overwritten.data() - partial_.data());
  }
}

std::string LineLabeller::feed(std::string_view bytes, Clock::time_point now) {
  std::string out;
  if (swallow_newline_ && !bytes.empty()) {
    if (bytes.front() == '\n') bytes.remove_prefix(1);
    swallow_newline_ = false;
  }
  partial_ += bytes;
  std::size_t begin = 0;
  for (std::size_t end; (end = partial_.find('\n', begin)) != std::string::npos; begin = end + 1)
    append(std::string_view(partial_).substr(begin, end - begin), out);
  partial_.erase(0, begin);
  show_progress(now, out);
  if (partial_.size() > kLongestLine) {
    append(partial_, out);
    partial_.clear();
  }
  return out;
}

std::string LineLabeller::finish() {
  std::string out;
  if (!visible(partial_).empty()) append(partial_, out);
  partial_.clear();
  return out;
}

}  // namespace dualpipe::run
