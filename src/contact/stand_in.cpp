#include "contact/stand_in.hpp"

#include <algorithm>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "contact/abandonable.hpp"
#include "contact/blocked_signals.hpp"
#include "contact/contact.hpp"
#include "contact/encryption.hpp"
#include "contact/host.hpp"
#include "contact/line.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;
using asio::ip::tcp;

/// Of ConnectOptions.
constexpr const char* default_communicator = "dualpipe";
constexpr int default_epoch = 0;
constexpr auto pause_between_looks = 50ms;

Line::Frame frame_of(const FailureReport& failure, int size) {
  const bool known = failure.origin >= 0 && failure.origin < size;
  return Line::frame_of(
      {{"failed",
        {{"origin", known ? failure.origin : failure.rank}, {"reason", absence_of(failure)}, {"dead", failure.rank}}}});
}

/// What both ways of telling have in common.
class Teller {
 public:
  Teller(const World& absent, const FailureReport& failure)
      : world_(absent),
        unix_name_(meeting_name(absent, default_communicator, default_epoch)),
        farewell_(frame_of(failure, absent.size)) {
    if (!world_.secret.empty()) encryption_.emplace(world_.secret);
  }
  virtual ~Teller() = default;
  Teller(const Teller&) = delete;
  Teller& operator=(const Teller&) = delete;

  virtual bool all_know() const = 0;
  /// Goes on with what cannot be done at once.
  virtual void look() = 0;

  asio::io_context& io() { return io_; }

 protected:
  Introduction introduction() const {
    Introduction introduction{.own = {}, .key = world_.secret, .encryption = nullptr, .check = {}};
    introduction.own.rank = world_.rank;
    introduction.own.size = world_.size;
    introduction.own.meeting = meeting_of_launchers(world_);
    // For whatever communicator.
    introduction.check = [this](const Greeting& theirs, const Ends& ends) -> std::string {
      if (theirs.rank < 0 || theirs.rank >= world_.size || (theirs.rank == 0) == (world_.rank == 0)) return "no rank";
      return ends.are_far() && !may_use_tcp(world_, ends.other) ? not_by_tcp : "";
    };
    return introduction;
  }

  /// Of the host of rank 0; nullopt: not known so far.
  std::optional<std::vector<tcp::endpoint>> endpoints() {
    try {
      return endpoints_.look([name = world_.master_address, port = world_.master_port] { return resolve(name, port); });
    } catch (const std::exception&) {
      return std::vector<tcp::endpoint>();
    }
  }

  const World world_;
  const std::string unix_name_;
  const Line::Frame farewell_;
  std::optional<Encryption> encryption_;  // ends after the connections
  asio::io_context io_{1};

 private:
  Lookup<std::vector<tcp::endpoint>> endpoints_;
};

/// In place of rank 0.
class Host final : public Teller {
 public:
  Host(const World& absent, const std::set<int>& met, const FailureReport& failure)
      : Teller(absent, failure),
        listener_(io_, introduction_of_host(), absent.size, [this](Contact contact) { admit(std::move(contact)); }) {
    for (int node = 1; node < absent.size / absent.local_size; ++node) nodes_.insert(node);
    for (const int rank : met) nodes_.erase(node_of(rank));
  }
  ~Host() override {
    listener_.close();
    for (const auto& line : lines_) line->close();
  }

  bool all_know() const override {
    return nodes_.empty() &&
           std::none_of(lines_.begin(), lines_.end(), [](const auto& line) { return line->is_open(); });
  }

  void look() override {
    here_ = here_ || opens([this] { listener_.listen_here(unix_name_); });
    there_ = there_ || is_loopback(world_.master_address) || listens_to_other_hosts();
  }

 private:
  Introduction introduction_of_host() {
    Introduction result = introduction();
    result.encryption = encryption_ ? &*encryption_ : nullptr;
    result.encryption_is_optional = true;
    return result;
  }

  template <class Action>
  static bool opens(const Action& action) {
    try {
      action();
      return true;
    } catch (const asio::system_error&) {  // taken, or no address of this host
      return false;
    }
  }

  /// As rank 0: at the master's own addresses, else at all of this host.
  bool listens_to_other_hosts() {
    const auto found = endpoints();
    if (!found) return false;
    bool listens = false;
    for (const tcp::endpoint& endpoint : *found)
      if (!endpoint.address().is_loopback() && opens([&] { listener_.listen_at(endpoint); })) listens = true;
    const auto port = static_cast<std::uint16_t>(world_.master_port);
    return listens || opens([&] { listener_.listen_at({tcp::v6(), port}); }) ||
           opens([&] { listener_.listen_at({tcp::v4(), port}); });
  }

  void admit(Contact contact) {
    nodes_.erase(node_of(contact.rank));
    const auto line =
        std::make_shared<Line>(std::move(contact.socket), [](const nlohmann::json&) {}, [](const std::string&) {});
    lines_.push_back(line);
    line->start();
    line->send(farewell_);
  }

  int node_of(int rank) const { return rank / world_.local_size; }

  std::set<int> nodes_;  ///< where nobody knows; where one rank does, its launcher tells the others
  std::vector<std::shared_ptr<Line>> lines_;
  bool here_ = false, there_ = false;
  Listener listener_;
};

/// In place of another rank.
class Guest final : public Teller {
 public:
  Guest(const World& absent, const std::set<int>& met, const FailureReport& failure)
      : Teller(absent, failure), told_(met.contains(0)) {}
  ~Guest() override {
    for (const auto& caller : callers_) caller->close();
    if (line_) line_->close();
  }

  bool all_know() const override { return told_; }
  void look() override {
    if (!callers_.empty()) return;
    call(nullptr);
    if (encryption_) call(&*encryption_);
  }

 private:
  void call(Encryption* encryption) {
    Introduction introduction = this->introduction();
    introduction.encryption = encryption;
    callers_.push_back(std::make_shared<Caller>(
        io_, introduction, [this] { return places(); }, [this](Contact contact) { connected(std::move(contact)); }));
    callers_.back()->start();
  }

  std::vector<Place> places() {
    std::vector<Place> places = {{"here", unix_endpoint(unix_name_), ""}};
    if (is_loopback(world_.master_address)) return places;
    for (const tcp::endpoint& endpoint : endpoints().value_or(std::vector<tcp::endpoint>()))
      if (may_use_tcp(world_, endpoint.address())) places.push_back({str(endpoint), endpoint, ""});
    return places;
  }

  void connected(Contact contact) {
    for (const auto& caller : callers_) caller->close();
    // Rank 0 answers by ending the meeting.
    line_ = std::make_shared<Line>(
        std::move(contact.socket),
        [this](const nlohmann::json& message) {
          if (!message.contains("failed")) return;
          told_ = true;
          line_->close();
        },
        [this](const std::string&) { told_ = true; });
    line_->start();
    line_->send(farewell_);
  }

  bool told_;
  std::vector<std::shared_ptr<Caller>> callers_;
  std::shared_ptr<Line> line_;
};

std::unique_ptr<Teller> teller_for(const World& absent, const std::set<int>& met, const FailureReport& failure) {
  if (absent.rank == 0) return std::make_unique<Host>(absent, met, failure);
  return std::make_unique<Guest>(absent, met, failure);
}

}  // namespace

Bytes32 meeting_of_launchers(const World& world) {
  return authentication_code(world.secret, {"launchers", world.run_id});
}

StandIn::StandIn(World absent, std::set<int> met, FailureReport failure, std::chrono::milliseconds limit) {
  const auto tell = [this, absent = std::move(absent), met = std::move(met), failure = std::move(failure),
                     limit](const std::stop_token& stop) {
    try {
      const std::unique_ptr<Teller> teller = teller_for(absent, met, failure);
      const auto end = std::chrono::steady_clock::now() + limit;
      while (!teller->all_know() && !stop.stop_requested() && std::chrono::steady_clock::now() < end) {
        teller->look();
        teller->io().restart();
        const auto next = std::chrono::steady_clock::now() + pause_between_looks;
        teller->io().run_until(next);
        std::this_thread::sleep_until(next);  // there may be nothing to run
      }
      all_know_ = teller->all_know();
    } catch (const std::exception&) {  // no descriptors, no memory: they learn of it at their timeout
    }
    over_ = true;
  };
  try {
    const BlockedSignals blocked;
    thread_ = std::jthread(tell);
  } catch (const std::system_error&) {  // no thread
    over_ = true;
  }
}

}  // namespace dualpipe::detail
