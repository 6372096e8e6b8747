#pragma once

#include <chrono>
#include <string>
#include <string_view>

namespace dualpipe::run {

/// Turns the bytes of one stream into labelled whole lines.
///
/// A carriage return is what it is on a terminal: it overwrites the line, so of "10%\r50%\r100%\n" the line "100%"
/// remains. A line that is overwritten again and again without ever ending, as progress bars do, is shown once a second
/// at most; on a terminal it stays one line that is overwritten, which lines of other streams may replace.
class LineLabeller {
 public:
  using Clock = std::chrono::steady_clock;

  /// @param terminal  where the lines go to.
  explicit LineLabeller(std::string label, bool terminal = false) : label_(std::move(label)), terminal_(terminal) {}

  /// @return the labelled lines that `bytes` complete, each with its newline, and on a terminal perhaps one that the
  /// next
  ///         overwrites; may be empty.
  std::string feed(std::string_view bytes, Clock::time_point now);
  /// @return the last line if it did not end, with a newline.
  std::string finish();

 private:
  void append(std::string_view line, std::string& out) const;
  void show_progress(Clock::time_point now, std::string& out);

  std::string label_;
  bool terminal_;
  std::string partial_;
  bool swallow_newline_ = false;  ///< the line that this newline would end has been shown
  Clock::time_point last_progress_ = Clock::time_point::min();
};

}  // namespace dualpipe::run
