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
  std::string host;       ///< ranks with the same one reach each other by Unix domain sockets
  std::string token;      ///< a caller that knows it has read it in the store
  std::string unix_name;  ///< of its listener for its own host, an abstract address; empty: it has none
  std::vector<asio::ip::tcp::endpoint> endpoints;  ///< of its listener for other hosts, the likeliest first
};

/// The cards of all ranks, as they exchange them through the store.
class Announcements {
 public:
  static constexpr std::size_t kTokenLength = 32;

  Announcements(const World& world, Rendezvous& rendezvous, Route route);

  const Announcement& operator[](int rank) const { return cards_[static_cast<std::size_t>(rank)]; }
  const Announcement& own() const { return (*this)[world_.rank]; }
  bool is_near(int rank) const { return (*this)[rank].host == own().host; }

  /// Publishes this rank's card and reads those of all others, still without endpoints.
  /// @throws CommError  a rank did not publish one in time, or is of another kind.
  void exchange();
  /// Whether a rank of another host will call here.
  bool has_far_callers() const;
  /// Publishes that this rank listens to other hosts at `port`.
  void announce(std::uint16_t port);
  /// Reads the endpoints of the ranks of other hosts that are to be called.
  void read_far_endpoints();
  /// Reads again what a rank that is to be called has published: it may stem from an earlier life of the same name.
  void read_again(int rank);

 private:
  void read_card(int rank, const std::string& text);
  void read_endpoints(int rank, const std::string& text);
  bool is_far_listener(int rank) const { return rank < world_.rank && !is_near(rank); }

  const World& world_;
  Rendezvous& rendezvous_;
  std::vector<Announcement> cards_;
};

}  // namespace dualpipe::detail
