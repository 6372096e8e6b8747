#include "socket/connect.hpp"

#include <sys/socket.h>

#include <algorithm>
#include <asio/ip/tcp.hpp>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <utility>

#include "contact/contact.hpp"
#include "contact/host.hpp"
#include "dualpipe/detail/error_text.hpp"
#include "socket/meeting.hpp"

namespace dualpipe::detail {
namespace {

using asio::ip::tcp;

/// How a rank can be reached. A lower rank listens, a higher one calls.
struct Reach {
  std::string host;                               ///< ranks with equal ones reach each other by Unix domain sockets
  std::string unix_name;                          ///< abstract address of the listener for its own host
  std::optional<asio::ip::address> sees_host_at;  ///< the address of rank 0, as this rank has reached it
  std::optional<tcp::endpoint> endpoint;          ///< of the listener for other hosts
};

class ConnectionBuilder {
 public:
  ConnectionBuilder(asio::io_context& io, const World& world, Meeting& meeting, Route route, Encryption* encryption)
      : io_(io),
        world_(world),
        meeting_(meeting),
        route_(route),
        encryption_(encryption),
        ranks_(world.size),
        contacts_(world.size),
        callers_(world.size) {}

  ~ConnectionBuilder() { close(); }
  ConnectionBuilder(const ConnectionBuilder&) = delete;
  ConnectionBuilder& operator=(const ConnectionBuilder&) = delete;

  std::vector<std::optional<Contact>> build() {
    // Opened before anybody learns where.
    Reach& own = ranks_[world_.rank];
    own.host = host_identity() + (route_ == Route::tcp ? str(" ", world_.rank) : "");
    own.unix_name = random_unix_name();
    if (meeting_.ends().are_far()) own.sees_host_at = meeting_.ends().other;
    exchange_hosts();
    listener_.emplace(io_, introduction([this](const Greeting& theirs, const Ends&) -> std::string {
                        return theirs.rank > world_.rank && theirs.rank < world_.size ? "" : "no rank that calls";
                      }),
                      world_.size, [this](Contact contact) { keep(std::move(contact)); });
    if (has_callers(/*near=*/true)) listener_->listen_here(own.unix_name);
    if (has_callers(/*near=*/false)) own.endpoint = listen_to_other_hosts();
    exchange_endpoints();
    for (int rank = 0; rank < world_.rank; ++rank) call(rank);
    meeting_.wait_until([this] { return !first_missing(); },
                        [this] { return str("rank ", *first_missing(), ", which has come, to connect"); },
                        [this] { return failure(*first_missing()); });
    meeting_.all_gather("", "is still without some of its connections");
    close();
    return std::move(contacts_);
  }

 private:
  void close() noexcept {
    for (const auto& caller : callers_)
      if (caller) caller->close();
    if (listener_) listener_->close();
  }

  Introduction introduction(std::function<std::string(const Greeting&, const Ends&)> check) const {
    Introduction result{.own = {}, .key = meeting_.session_key(), .encryption = encryption_, .check = {}};
    result.own.rank = world_.rank;
    result.own.size = world_.size;
    result.own.meeting = authentication_code(result.key, {"connections"});
    result.check = [meeting = result.own.meeting, check = std::move(check)](const Greeting& theirs, const Ends& ends) {
      return theirs.meeting == meeting ? check(theirs, ends) : another_meeting;
    };
    return result;
  }

  bool is_near(int rank) const { return ranks_[rank].host == ranks_[world_.rank].host; }
  bool has_callers(bool near) const {
    for (int rank = world_.rank + 1; rank < world_.size; ++rank)
      if (is_near(rank) == near) return true;
    return false;
  }

  /// Reads what a rank has said. @param action  its exceptions become CommErrors.
  template <class Action>
  void read(int rank, const std::string& text, const Action& action) const {
    const auto malformed = [&](const std::string& problem) {
      return CommError(rank, "rendezvous",
                       str("rank ", world_.rank, ": rank ", rank, " has said something malformed (", problem, ")"));
    };
    try {
      action(nlohmann::json::parse(text));
    } catch (const std::exception& error) {
      throw malformed(error.what());
    }
  }

  void exchange_hosts() {
    const Reach& own = ranks_[world_.rank];
    const nlohmann::json mine = {
        {"host", own.host}, {"unix", own.unix_name}, {"rank 0", own.sees_host_at ? own.sees_host_at->to_string() : ""}};
    const std::vector<std::string> all = meeting_.all_gather(mine.dump(), "");
    for (int rank = 0; rank < world_.size; ++rank)
      read(rank, all[rank], [&](const nlohmann::json& json) {
        ranks_[rank].host = json.at("host").get<std::string>();
        ranks_[rank].unix_name = json.at("unix").get<std::string>();
        unix_endpoint(ranks_[rank].unix_name);  // throws if it is too long
        const auto seen = json.at("rank 0").get<std::string>();
        if (!seen.empty()) ranks_[rank].sees_host_at = asio::ip::make_address(seen);
      });
  }

  /// At the address that this rank has towards the others; of the host of rank 0 they say which that is.
  tcp::endpoint listen_to_other_hosts() {
    asio::ip::address address = meeting_.ends().own;
    for (const Reach& rank : ranks_)
      if (address.is_unspecified() && rank.sees_host_at) address = *rank.sees_host_at;
    try {
      return {address, listener_->listen_at({address, 0})};
    } catch (const asio::system_error& error) {
      if (error.code() != std::errc::address_not_available) throw;
    }
    // The others see another address than this host has: it is translated on the way.
    try {
      return {address, listener_->listen_at({tcp::v6(), 0})};
    } catch (const asio::system_error&) {  // no IPv6 here
      return {address, listener_->listen_at({tcp::v4(), 0})};
    }
  }

  void exchange_endpoints() {
    const auto& own = ranks_[world_.rank].endpoint;
    const nlohmann::json mine = {{"address", own ? own->address().to_string() : ""}, {"port", own ? own->port() : 0}};
    const std::vector<std::string> all = meeting_.all_gather(mine.dump(), "has come, but does not go on");
    for (int rank = 0; rank < world_.rank; ++rank)
      read(rank, all[rank], [&](const nlohmann::json& json) {
        const auto address = json.at("address").get<std::string>();
        const nlohmann::json& port = json.at("port");
        if (!port.is_number_unsigned() || port > 65535) throw std::runtime_error("no port: " + port.dump());
        if (!address.empty()) ranks_[rank].endpoint = {asio::ip::make_address(address), port.get<std::uint16_t>()};
      });
  }

  void call(int rank) {
    std::vector<Place> places;
    if (is_near(rank))
      places.push_back({"its Unix domain socket", unix_endpoint(ranks_[rank].unix_name), ""});
    else if (ranks_[rank].endpoint)
      places.push_back({str(*ranks_[rank].endpoint), *ranks_[rank].endpoint, ""});
    callers_[rank] = std::make_shared<Caller>(
        io_, introduction([rank](const Greeting& theirs, const Ends&) {
          return theirs.rank == rank ? "" : str("rank ", theirs.rank, " answers");
        }),
        [places] { return places; }, [this](Contact contact) { keep(std::move(contact)); });
    callers_[rank]->start();
  }

  /// A rank whose first call was cut off on the way calls again. Nobody else takes its place.
  void keep(Contact contact) {
    auto& place = contacts_[contact.rank];
    if (!place || has_ended(place->socket)) place = std::move(contact);
  }

  static bool has_ended(StreamSocket& socket) {
    char byte;
    const ssize_t size = ::recv(socket.native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return size == 0 || (size < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
  }

  std::optional<int> first_missing() const {
    for (int rank = 0; rank < world_.size; ++rank)
      if (rank != world_.rank && !contacts_[rank]) return rank;
    return std::nullopt;
  }

  CommError failure(int rank) const {
    const std::string advice =
        is_near(rank) ? "" : "; is there a firewall between the hosts? All TCP ports must be open";
    std::string what;
    if (rank < world_.rank)
      what = "cannot be reached at " + callers_[rank]->outcomes() + advice;
    else if (is_near(rank))
      what = "does not connect";
    else
      what = str("does not connect to this one at ", *ranks_[world_.rank].endpoint, advice);
    return {rank, "rendezvous", str("rank ", world_.rank, ": rank ", rank, " has started but ", what)};
  }

  asio::io_context& io_;
  const World& world_;
  Meeting& meeting_;
  const Route route_;
  Encryption* const encryption_;
  std::vector<Reach> ranks_;
  std::vector<std::optional<Contact>> contacts_;
  std::vector<std::shared_ptr<Caller>> callers_;
  std::optional<Listener> listener_;
};

/// The same connections on another io_context.
std::vector<Connection> moved_to(asio::io_context& io, std::vector<std::optional<Contact>> contacts) {
  std::vector<Connection> result;
  for (auto& contact : contacts) {
    if (!contact) continue;
    const auto protocol = contact->socket.local_endpoint().protocol();
    result.push_back({.peer = contact->rank,
                      .socket = StreamSocket(io, protocol, contact->socket.release()),
                      .clock_offset_ns = contact->clock_offset_ns,
                      .broken = contact->broken});
  }
  return result;
}

}  // namespace

std::vector<Connection> connect_all(asio::io_context& io, const World& world, const ConnectOptions& options,
                                    Route route, Encryption* encryption) {
  asio::io_context own{1};  // pending handlers end with it
  const auto meeting = meet(own, world, options, route, encryption);
  const auto failed = [&](const std::exception& error) {
    return CommError(world.rank, "rendezvous", str("rank ", world.rank, ": cannot connect: ", message_of(error)));
  };
  try {
    meeting->join();
    ConnectionBuilder builder(own, world, *meeting, route, encryption);
    auto contacts = builder.build();
    meeting->leave();
    return moved_to(io, std::move(contacts));
  } catch (const CommError& error) {
    meeting->give_up(error);
    throw;
  } catch (const std::exception& error) {  // no descriptors, no memory, …
    meeting->give_up(failed(error));
    throw failed(error);
  }
}

}  // namespace dualpipe::detail
