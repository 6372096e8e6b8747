#pragma once

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/socket.hpp"

namespace dualpipe::detail {

/// What the ranks tell each other before they are connected, kept in a c10d store. Keeps references to the arguments of
/// its constructor. After a long wait for others it says so once, as a LibTorch warning.
class Rendezvous {
 public:
  using Clock = std::chrono::steady_clock;

  Rendezvous(const World& world, const ConnectOptions& options, Clock::time_point deadline);
  ~Rendezvous();
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;

  /// Publishes `value` as this rank's `key`.
  void publish(const std::string& key, const std::string& value);
  /// What `ranks` have published as `key`, in the order of `ranks`.
  /// @throws CommError  some did not in time, which the text names; or another rank has failed.
  std::vector<std::string> collect(const std::string& key, const std::vector<int>& ranks);
  /// Tells the ranks that still collect why this one gives up. The rank that serves the store returns when they know:
  /// the end of its process would overtake the reason.
  void give_up(const CommError& error) noexcept;

 private:
  c10::intrusive_ptr<c10d::Store> open();
  void await_server();
  /// Those of `ranks` that have not published `key`.
  std::vector<int> missing(const std::string& key, const std::vector<int>& ranks);
  void throw_if_another_gave_up();
  bool is_time_to_warn() const;
  /// `what` completes "rank 3 waits for …".
  void warn_once(const std::string& what);
  /// Runs `action` on the store; its exceptions become CommErrors.
  template <class Action>
  auto with_store(const Action& action) const;

  const World& world_;
  const ConnectOptions& options_;
  const Clock::time_point deadline_;
  const Clock::time_point warn_at_;
  bool warned_ = false;
  bool serves_ = false;  ///< the store, until the process ends
  const c10::intrusive_ptr<c10d::Store> store_;
};

}  // namespace dualpipe::detail
