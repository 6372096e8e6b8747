#pragma once

#include <asio/ip/tcp.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "socket/connect.hpp"
#include "socket/rendezvous.hpp"

namespace dualpipe::detail {

/// How a rank can be reached. A lower rank listens, a higher one calls.
struct Announcement {
  std::string host;                                ///< ranks with equal ones reach each other by Unix domain sockets
  std::string token;                               ///< callers show it: they have read it in the store
  std::string unix_name;                           ///< abstract address of the listener for its own host; empty: none
  std::vector<asio::ip::tcp::endpoint> endpoints;  ///< of the listener for other hosts, the likeliest first
};

/// The announcements of all ranks, as they exchange them through the store.
///
/// Functions that read throw a CommError that names the rank whose announcement is malformed.
class Announcements {
 public:
  static constexpr std::size_t token_length = 32;

  Announcements(const World& world, Rendezvous& rendezvous, Route route);

  const Announcement& operator[](int rank) const { return announcements_[rank]; }
  const Announcement& own() const { return (*this)[world_.rank]; }
  bool is_near(int rank) const { return (*this)[rank].host == own().host; }

  /// Publishes this rank's announcement and reads those of all others, still without endpoints.
  /// @throws CommError  a rank did not publish one in time, or has another protocol or world.
  void exchange();
  /// Whether a rank of another host will call this one.
  bool has_far_callers() const;
  /// Publishes that this rank listens to other hosts at `port`.
  void announce(std::uint16_t port);
  /// Reads the endpoints of ranks on other hosts that this rank will call.
  void read_far_endpoints();
  /// Reads a lower rank's announcement again: the first one may come from an earlier run of the same name.
  void read_again(int rank);

 private:
  void read_announcement(int rank, const std::string& text);
  void read_endpoints(int rank, const std::string& text);
  /// Runs `action` on the JSON in `text`; its exceptions become CommErrors.
  template <class Action>
  void parse(int rank, const std::string& text, const Action& action) const;
  bool is_far_listener(int rank) const { return rank < world_.rank && !is_near(rank); }

  const World& world_;
  Rendezvous& rendezvous_;
  std::vector<Announcement> announcements_;
};

}  // namespace dualpipe::detail
