#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <cstddef>
#include <deque>
#include <functional>
#include <string>

#include "tools/run/spawn.hpp"

namespace dualpipe::run {

/// Standard output or standard error of the launcher. What its reader does not take yet waits here, not the launcher:
/// a paused terminal or pager must not keep it from ranks that fail and from signals.
class Output {
 public:
  /// With 0 when the text has been written, else with the errno with which it was lost.
  using Handler = std::function<void(int error)>;

  Output(asio::io_context& io, int target);

  void write(std::string text, Handler handler);
  bool is_waiting() const { return !queue_.empty(); }

 private:
  struct Item {
    std::string text;
    std::size_t written;
    Handler handler;
  };

  void write_more();
  int write_some(Item& item) const;

  const Descriptor terminal_;  ///< the target once more, non-blocking for this process alone; else none
  const int target_;
  asio::steady_timer retry_;
  std::deque<Item> queue_;
};

}  // namespace dualpipe::run
