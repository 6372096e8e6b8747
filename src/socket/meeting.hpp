#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "contact/contact.hpp"
#include "contact/line.hpp"
#include "dualpipe/comm/socket.hpp"
#include "dualpipe/detail/comm/stopwatch.hpp"
#include "socket/connect.hpp"

namespace dualpipe::detail {

/// The ranks before they are connected with each other: all but rank 0 call rank 0, and what one says goes through it to
/// all. From the first connection on every rank beats, so that a rank that is killed, or that falls silent, is named on
/// all others; and one that gives up says why. Of a rank that ends before its first connection the launcher tells: those
/// of its node by a file, those of others in its place (StandIn).
///
/// Everything happens on the thread that calls the functions, while they wait. Keeps references to the arguments of
/// meet().
class Meeting {
 public:
  using Clock = std::chrono::steady_clock;

  virtual ~Meeting() = default;
  Meeting(const Meeting&) = delete;
  Meeting& operator=(const Meeting&) = delete;

  /// Before anything else. Rank 0 returns when it listens, the others when it has let them in.
  /// @throws CommError  as wait_until(); rank 0 cannot listen.
  virtual void join() = 0;

  /// Collective: what all ranks say, by rank.
  ///
  /// @param lacks  completes "rank 2 …" for ranks that have not come so far until the deadline.
  /// @throws CommError  as wait_until().
  std::vector<std::string> all_gather(const std::string& mine, const std::string& lacks);

  /// Waits while the ranks beat. After a long time a warning says why nothing happens, once.
  ///
  /// @param what  completes "rank 3 waits for …".
  /// @param late  what is thrown at the deadline.
  /// @param look_every  longest time between two calls of `condition`.
  /// @throws CommError  that; or the same on all ranks: one has died, has been silent, or has given up.
  void wait_until(const std::function<bool()>& condition, const std::function<std::string()>& what,
                  const std::function<CommError()>& late,
                  std::chrono::milliseconds look_every = std::chrono::minutes(1));

  /// All have what they need; returns when nobody looks at this rank any more.
  virtual void leave() = 0;
  /// Tells all others why this rank gives up, and returns when they know, or after a second: rank 0 tells those as well
  /// that come meanwhile.
  virtual void give_up(const CommError& error) noexcept = 0;

  /// The same on all ranks that meet here, and secret if the job has a secret or all are on one host.
  virtual std::string session_key() const = 0;
  /// Of this rank's connection to rank 0; unspecified on the host of rank 0.
  virtual Ends ends() const { return {}; }

 protected:
  Meeting(asio::io_context& io, const World& world, const ConnectOptions& options);

  /// Who lacks what, as rank 0 sees it.
  struct Status {
    std::vector<int> missing;
    std::string lacks;
  };

  virtual void say(const std::string& mine) = 0;
  /// The part of an all_gather() that others have not done so far; completes "rank 3 waits for …".
  virtual std::string waits_for() const = 0;
  virtual CommError late() const = 0;
  virtual void pulse() = 0;  ///< to beat and to look for silent ranks
  /// Fails if the launcher has told of a rank of this node that has ended.
  void look_for_dead();

  void fail(int origin, const std::string& reason);
  /// The connection to a rank has ended; `why` as Line says it.
  void fail_by_end(int rank, const std::string& why);
  /// What a rank that gives up sends, and what is done with it.
  Line::Frame failure_frame(const CommError& error) const;
  void fail_as_told(const nlohmann::json& failed);
  bool is_rank(std::int64_t number) const { return number >= 0 && number < world_.size; }
  /// Runs handlers until `condition` or for `patience`.
  void drain(std::chrono::milliseconds patience, const std::function<bool()>& condition) noexcept;
  CommError late(const Status& status) const;
  std::string waits_for(const Status& status) const;
  std::string silence_of(int rank) const;
  bool looks_for_silence() const { return options_.liveness.count() > 0; }

  asio::io_context& io_;
  const World& world_;
  const ConnectOptions& options_;
  const std::string met_file_;
  Stopwatch watch_;  ///< since the beginning
  Status status_;
  std::optional<std::vector<std::string>> result_;  ///< of the round that has ended last

 private:
  void beat_regularly();

  const std::chrono::milliseconds period_;
  const std::string failed_file_;
  bool warned_ = false;
  std::optional<CommError> failure_;
  asio::steady_timer timer_;

 protected:
  std::optional<int> dead_;   ///< a rank that has ended before it came
  bool was_stopped_ = false;  ///< this process, since the last pulse: silence of others means nothing
};

/// Of this rank, which has not joined so far.
///
/// @param io  has no other work.
std::unique_ptr<Meeting> meet(asio::io_context& io, const World& world, const ConnectOptions& options, Route route,
                              Encryption* encryption);

}  // namespace dualpipe::detail
