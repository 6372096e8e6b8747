#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "contact/abandonable.hpp"
#include "contact/contact.hpp"
#include "dualpipe/comm/socket.hpp"
#include "dualpipe/detail/comm/stopwatch.hpp"
#include "socket/connect.hpp"

namespace dualpipe::detail {

/// Where rank 0 waits for the others: at an abstract Unix domain socket for those of its host, and at a TCP port where
/// ranks may come from elsewhere. The port is the world's master port, or one that rank 0 chooses and tells in a c10d
/// store: that of the caller, or the launcher's. Of the store only this one value is used; it proves nothing, so what it
/// says is tried and must then prove itself. The calls to it run on threads that are left to themselves at the timeout,
/// since some have none.
class MeetingPlace {
 public:
  /// Keeps references to `world`, `options` and `watch`.
  ///
  /// @param watch  runs since the beginning of the timeout.
  MeetingPlace(const World& world, const ConnectOptions& options, Stopwatch& watch, Route route);

  /// Returns when `free` does so with true; `place` is what it tries to listen at.
  using Wait = std::function<void(const std::string& place, const std::function<bool()>& free)>;
  /// Rank 0: listens, and tells the others where.
  /// @param wait  lets in meanwhile who comes to the places that are open. May throw.
  /// @throws CommError  it cannot listen, or the store has failed.
  void open(Listener& listener, const Wait& wait);
  /// The other ranks: where rank 0 may be, as far as the store and the name of its host are known so far.
  std::vector<Place> places();

 private:
  using StorePtr = c10::intrusive_ptr<c10d::Store>;

  bool is_local() const;
  Place place_at(const std::string& name, const asio::ip::tcp::endpoint& endpoint) const;
  std::uint16_t listening_port() const { return static_cast<std::uint16_t>(uses_store_ ? 0 : world_.master_port); }
  std::vector<asio::ip::tcp::endpoint> listening_endpoints();
  /// At these, or at all addresses of this host. @return the endpoints that it listens at.
  std::vector<asio::ip::tcp::endpoint> listen(const std::vector<asio::ip::tcp::endpoint>& endpoints, Listener& listener,
                                              const Wait& wait) const;
  std::string store_key() const;
  /// What opens the launcher's store.
  std::function<StorePtr()> opening() const;
  std::vector<Place> places_in_store();
  CommError failure(const std::string& what) const;

  const World& world_;
  const ConnectOptions& options_;
  Stopwatch& watch_;
  const Route route_;
  const bool uses_store_;
  std::string unix_name_;  ///< empty: ranks of this host come by TCP as well
  StorePtr store_;
  // Used by the other ranks, not by rank 0.
  Lookup<StorePtr> opened_;
  Lookup<std::string> in_store_;
  Lookup<std::vector<asio::ip::tcp::endpoint>> endpoints_;
};

}  // namespace dualpipe::detail
